"""The rules as Ray Serve's autoscaling policies, which its controller asks ten times a second.

A policy that raises stops the controller's tick, and one that blocks holds up every deployment: so
these only read what a thread has seen, and hold the last target whenever anything is wrong.

Serve pickles this module by value: nothing in it may be a lock, or be shared.
"""

import logging
import time
from dataclasses import asdict
from typing import Any, Literal

from schemas.autoscale import CAPACITY_METRIC
from schemas.settings import Settings
from tapeline.autoscale.observe import Observation, Observer, observer_of
from tapeline.autoscale.rules import (
    Bounds,
    Decision,
    Memory,
    desired_replicas,
    desired_workers,
)
from tapeline.autoscale.trace import Entry, record, trace_path

Role = Literal["workers", "replicas"]
_log = logging.getLogger("ray.serve.tapeline")  # the controller's own log


class LagPolicy:
    """One deployment's number, by the lag and the rate of the lanes.

    Args:
        settings: as JSON; Serve hands keyword arguments on as such.
        role: whose number it is.
        observer: what has seen the lanes; None: the application's own.
    """

    def __init__(
        self, settings: dict[str, Any], role: Role, observer: Observer | None = None
    ) -> None:
        self._settings = Settings.model_validate(settings)
        self._role = role
        self._observer = observer or observer_of(self._settings)
        self._path = trace_path(self._settings)
        self._seen = 0
        self._held: str | None = None
        self._gauges = _gauges()

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The target, and what to remember: never raises, never blocks."""
        try:
            return self._decide(context)
        except Exception:  # it would end the controller's tick for all deployments
            _log.exception("autoscaling of %s failed", self._role)
            return context.target_num_replicas, dict(context.policy_state or {})

    def _decide(self, context: Any) -> tuple[int, dict[str, Any]]:
        target: int = context.target_num_replicas
        state = dict(context.policy_state or {})
        observation, error = self._observer.latest()
        now_s = time.monotonic()
        if observation is None or now_s - observation.at_s > self._settings.autoscale.stale_after_s:
            self._hold(error or "the broker was not looked at yet", target, context)
            return target, state
        if observation.number in (self._seen, 1):  # decided already; or there are no rates yet
            return int(state.get("target", target)), state
        self._seen, self._held = observation.number, None
        memory = Memory(**state["memory"]) if "memory" in state else Memory()
        decide = desired_workers if self._role == "workers" else desired_replicas
        decision, memory = decide(
            observation.lanes,
            self._capacity(context),
            target,
            self._bounds(),
            memory,
            observation.at_s,
        )
        self._note(decision, observation, context)
        return decision.target, state | {"target": decision.target, "memory": asdict(memory)}

    def _capacity(self, context: Any) -> float:
        reported = (context.aggregated_metrics or {}).get(CAPACITY_METRIC, {})
        known = [value for value in reported.values() if value > 0]
        settings = self._settings.autoscale
        workers = self._role == "workers"
        default = settings.worker_events_per_s if workers else settings.replica_windows_per_s
        return sum(known) / len(known) if known else default

    def _bounds(self) -> Bounds:
        settings = self._settings.autoscale
        if self._role == "workers":
            least, most = settings.min_workers, settings.max_workers
            start_s, stop_s = settings.worker_start_s, settings.rebalance_s
        else:
            least, most = settings.min_replicas, settings.max_replicas
            start_s, stop_s = settings.replica_start_s, 0.0
        return Bounds(least, most, settings.utilisation, start_s, stop_s, settings.idle_s)

    def _note(self, decision: Decision, observation: Observation, context: Any) -> None:
        if decision.target != decision.current:
            _log.info(
                "%s: from %d to %d: %s",
                self._role,
                decision.current,
                decision.target,
                decision.why,
            )
        self._gauges["target"].set(decision.target, {"role": self._role})
        self._gauges["held"].set(0, {"role": self._role})
        self._record(
            Entry(
                time.time(), self._role, context.current_num_replicas, observation.lanes, decision
            )
        )

    def _hold(self, why: str, target: int, context: Any) -> None:
        """Says so once for each reason; the controller asks ten times a second."""
        self._gauges["held"].set(1, {"role": self._role})
        if why == self._held:
            return
        self._held = why
        _log.warning("%s stay %d: %s", self._role, target, why)
        self._record(
            Entry(time.time(), self._role, context.current_num_replicas, (), None, held=why)
        )

    def _record(self, entry: Entry) -> None:
        try:
            record(self._path, entry)
        except OSError as error:
            _log.warning("cannot record decisions in %s: %s", self._path, error.strerror)


def policy_settings(settings: Settings) -> dict[str, Any]:
    """What a policy needs of the settings, as JSON; paths absolute, for the controller's working
    directory is another one.
    """
    autoscale = settings.autoscale.model_copy(update={"trace": trace_path(settings).absolute()})
    return settings.model_copy(update={"autoscale": autoscale}).model_dump(mode="json")


def _gauges() -> dict[str, Any]:
    from ray.util.metrics import Gauge

    return {
        "target": Gauge(
            "tapeline_autoscale_target", "How many there are to be.", tag_keys=("role",)
        ),
        "held": Gauge(
            "tapeline_autoscale_held",
            "1 while the number stays as it is because lag is unknown.",
            tag_keys=("role",),
        ),
    }
