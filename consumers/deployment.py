"""The worker on Ray Serve: each replica is one worker, and they share a lane's partitions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from consumers.capacity import CapacityMeter
from consumers.dedup import open_first_seen
from consumers.identity import claimed_name, replica_name
from consumers.logs import configure_logging
from consumers.metrics import WorkerStatistics
from consumers.tracing import open_tracing
from consumers.worker import Worker
from inference.redeploy import MODEL_NAME, WORKER_NAME, with_version
from inference.remote import ServeInferencer
from schemas.autoscale import CAPACITY_METRIC
from schemas.exposition import Target, expose
from schemas.live import fixed_version, live_part, with_live_part
from schemas.pauses import spare_what_is_loaded
from schemas.placement import pin_process
from schemas.settings import Settings


class StreamWorker:
    """One replica: a worker whose loop runs beside the replica's own calls.

    A loop that ends by itself fails the health check, and so does a partition whose head does not
    move; Serve then replaces the replica.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, model: DeploymentHandle[Any]
    ) -> None:
        configure_logging()
        pin_process("worker.cpu_affinity", settings.worker.cpu_affinity)
        self._settings = settings
        self._name = ExitStack()  # lets go of a claimed one
        self._first_seen = await open_first_seen(settings.redis)
        self._capacity = CapacityMeter()
        name = self._claim_name()
        self._worker = Worker(
            settings,
            ServeInferencer(model),
            self._first_seen,
            instance_id=name,
            num_replicas=settings.model.num_replicas,
            tracing=open_tracing(settings.tracing),
        )
        self._target = expose("worker", gpu=False) if settings.metrics.port else None
        spare_what_is_loaded()
        self._running = asyncio.create_task(self._worker.run())
        if settings.autoscale.enabled:
            self._following = asyncio.create_task(self._follow_replicas())

    def _claim_name(self) -> str | None:
        """Its rank's, which a replacement has again; where their number changes Serve hands ranks
        on to replicas that run already, so there it is a slot of the machine.
        """
        if not self._settings.autoscale.enabled:
            rank = serve.get_replica_context().rank
            return replica_name(self._settings, rank.rank if rank else 0)
        return self._name.enter_context(claimed_name(self._settings))

    async def _follow_replicas(self) -> None:
        """Tells the worker its share of the model's replicas, as their number changes."""
        while True:
            await asyncio.sleep(self._settings.autoscale.period_s)
            with suppress(RuntimeError, RayError):  # the controller is away: next time
                replicas, workers = await asyncio.to_thread(self._count_running)
                self._worker.share_model(max(1, -(-replicas // max(workers, 1))))

    def _count_running(self) -> tuple[int, int]:
        application = serve.status().applications[self._settings.serve.app_name]
        model, worker = (
            sum(
                number
                for state, number in application.deployments[name].replica_states.items()
                if state == "RUNNING"
            )
            for name in (MODEL_NAME, WORKER_NAME)
        )
        return model, worker

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Serve calls it at the start, and when an application is deployed again whose shares,
        deadlines or limits alone differ.
        """
        self._worker.configure(with_live_part(self._settings, user_config))

    async def settings(self) -> Settings:
        """What the replica was started with."""
        return self._settings

    async def check_health(self) -> None:
        """Raises what ended the loop, or which partitions have stalled.

        A drained worker is well: it waits to be taken away.
        """
        if self._running.done():
            self._running.result()
        else:
            self._worker.check_health()

    async def statistics(self) -> WorkerStatistics:
        """Of the one replica that answers."""
        return self._worker.statistics()

    async def metrics_target(self) -> Target | None:
        """Where Prometheus finds this replica."""
        return self._target

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to the autoscaling policy: events a second that this worker could do."""
        statistics = self._worker.statistics()
        num_records = sum(lane.records for lane in statistics.lanes.values())
        self._capacity.observe(num_records, time.process_time())
        per_s = self._capacity.per_s(
            in_flight=self._settings.worker.max_in_flight, service_s=statistics.service_s
        )
        return {CAPACITY_METRIC: per_s or 0.0}

    async def drain(self) -> WorkerStatistics:
        """Finishes what is in flight, commits, leaves the group; the last statistics.

        A loop that had failed raises what ended it.
        """
        self._worker.stop()
        await asyncio.shield(self._running)
        return self._worker.statistics()

    async def __del__(self) -> None:
        """Serve awaits this when it stops a replica; a constructor that failed left no loop."""
        if hasattr(self, "_following"):
            self._following.cancel()
        if hasattr(self, "_running") and not self._running.done():
            await self.drain()
            await self._first_seen.close()
            self._name.close()


def build_worker_deployment(
    settings: Settings, model: Application, *, autoscaling: dict[str, Any] | None = None
) -> Application:
    """The Serve application of worker and model, ready for ``serve.run``.

    Args:
        autoscaling: Serve's ``autoscaling_config``, instead of ``serve.num_workers``.
    """
    # A replica's working directory is not the user's.
    settings = settings.model_copy(update={"state_dir": settings.state_dir.absolute()})
    drain_s = settings.worker.drain_timeout_s + 2 * settings.kafka.timeout_s
    as_deployment = serve.deployment(
        name=WORKER_NAME,
        user_config=live_part(settings),
        num_replicas=None if autoscaling else settings.serve.num_workers,
        autoscaling_config=autoscaling,
        graceful_shutdown_timeout_s=drain_s + 10,
        ray_actor_options={"num_cpus": settings.serve.worker_num_cpus},
        logging_config={"enable_access_log": False},
    )
    version = fixed_version(settings)
    return with_version(as_deployment(StreamWorker), version).bind(settings, model)
