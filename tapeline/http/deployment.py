"""The HTTP door on Ray Serve: an application of its own, that asks the model of another."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from consumers.logs import configure_logging
from inference.redeploy import MODEL_NAME
from inference.remote import ServeInferencer
from schemas.settings import Settings
from tapeline.http.api import build_api
from tapeline.http.latest import LatestFeatures


class HttpDoor:
    """One replica: the API, and the features that it reads along."""

    def __init__(self, settings: Settings) -> None:
        configure_logging()
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:  # the name that Serve calls
        settings = self._settings
        latest = LatestFeatures(settings.http.max_symbols)
        model: Any = serve.get_deployment_handle(MODEL_NAME, settings.serve.app_name)

        @asynccontextmanager
        async def follow(_: FastAPI) -> AsyncIterator[None]:
            following = asyncio.create_task(latest.follow(settings))
            yield
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following

        inferencer = ServeInferencer(model, timeout_s=settings.http.timeout_s)
        return build_api(settings.http, inferencer, latest, follow)


def build_http_deployment(settings: Settings) -> Application:
    """The Serve application of the door; the model's must be running."""
    door = serve.ingress()(HttpDoor)
    as_deployment = serve.deployment(
        name="http",
        num_replicas=settings.http.num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": settings.http.num_cpus},
        logging_config={"enable_access_log": False},
    )
    return as_deployment(door).bind(settings)
