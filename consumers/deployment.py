"""The worker on Ray Serve: each replica is one worker, and they share a lane's partitions."""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from consumers.dedup import open_first_seen
from consumers.identity import replica_name
from consumers.logs import configure_logging
from consumers.metrics import WorkerStatistics
from consumers.worker import Worker
from inference.client import ServeInferencer
from schemas.settings import Settings

DEPLOYMENT_NAME = "worker"


class StreamWorker:
    """One replica: a worker whose loop runs beside the replica's own calls.

    A loop that ends by itself fails the health check, and so does a partition whose head does not
    move; Serve then replaces the replica.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, model: DeploymentHandle[Any]
    ) -> None:
        configure_logging()
        self._first_seen = await open_first_seen(settings.redis)
        rank = serve.get_replica_context().rank
        self._worker = Worker(
            settings,
            ServeInferencer(model),
            self._first_seen,
            instance_id=replica_name(settings, rank.rank if rank else 0),
        )
        self._running = asyncio.create_task(self._worker.run())

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

    async def drain(self) -> WorkerStatistics:
        """Finishes what is in flight, commits, leaves the group; the last statistics.

        A loop that had failed raises what ended it.
        """
        self._worker.stop()
        await asyncio.shield(self._running)
        return self._worker.statistics()

    async def __del__(self) -> None:
        """Serve awaits this when it stops a replica; a constructor that failed left no loop."""
        if hasattr(self, "_running") and not self._running.done():
            await self.drain()
            await self._first_seen.close()


def build_worker_deployment(settings: Settings, model: Application) -> Application:
    """The Serve application of worker and model, ready for ``serve.run``."""
    drain_s = settings.worker.drain_timeout_s + 2 * settings.kafka.timeout_s
    as_deployment = serve.deployment(
        name=DEPLOYMENT_NAME,
        num_replicas=settings.serve.num_workers,
        graceful_shutdown_timeout_s=drain_s + 10,
        ray_actor_options={"num_cpus": settings.serve.worker_num_cpus},
        logging_config={"enable_access_log": False},
    )
    return as_deployment(StreamWorker).bind(settings, model)
