"""The processor as Ray Serve applications, for ``serve.run`` or by import path in a Serve config.

``tapeline.serving:application`` and ``tapeline.serving:http`` are what a Serve config file or a
KubeRay RayService names (``ops/k8s``); settings come from the environment there.
"""

from typing import Any

from ray.serve import Application
from ray.serve.config import AutoscalingPolicy

from consumers.deployment import build_worker_deployment
from inference.deployment import build_model_deployment
from schemas.live import fixed_version
from schemas.settings import Settings, load_settings
from tapeline.autoscale.policy import Role, policy_settings
from tapeline.http.deployment import build_http_deployment


def application(args: dict[str, Any]) -> Application:
    """Workers and model. ``args`` are sections of the settings, over file and environment."""
    return build_application(load_settings(**args))


def http(args: dict[str, Any]) -> Application:
    """The HTTP door, beside ``application``."""
    return build_http_deployment(load_settings(**args))


def build_application(settings: Settings) -> Application:
    """Workers and model, autoscaled if the settings say so.

    Raises ConfigError: see ``build_model_deployment``.
    """
    model = build_model_deployment(
        settings.model,
        settings.serve,
        window=settings.window,
        metrics=settings.metrics,
        version=fixed_version(settings),
        autoscaling=_autoscaling(settings, "replicas"),
    )
    return build_worker_deployment(settings, model, autoscaling=_autoscaling(settings, "workers"))


def _autoscaling(settings: Settings, role: Role) -> dict[str, Any] | None:
    """Serve's configuration of an autoscaled deployment: bounds and policy are ours, and what Serve
    would add to a policy's answer, delays above all, is off.
    """
    autoscale = settings.autoscale
    if not autoscale.enabled:
        return None
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="tapeline.autoscale.policy:LagPolicy",
        policy_kwargs={"settings": policy_settings(settings), "role": role},
    )
    return {
        "min_replicas": getattr(autoscale, f"min_{role}"),
        "max_replicas": getattr(autoscale, f"max_{role}"),
        "upscale_delay_s": 0,
        "downscale_delay_s": 0,
        "downscale_to_zero_delay_s": 0,
        "look_back_period_s": max(10.0, 2 * autoscale.period_s),
        "metrics_interval_s": autoscale.period_s,
        "policy": policy,
    }
