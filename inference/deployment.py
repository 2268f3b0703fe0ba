"""The model on Ray Serve: one call carries a whole micro-batch."""

import asyncio
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from prometheus_client.registry import REGISTRY
from ray import serve
from ray.serve import Application

from inference.client import Inference, ModelDescription, best_rate, engine_thread
from inference.engine import EngineStatistics
from inference.hosted import host_models
from inference.metrics import ModelCollector
from inference.redeploy import MODEL_NAME, with_version
from inference.shared import BlockName, Mappings, Written
from schemas.autoscale import CAPACITY_METRIC
from schemas.errors import ConfigError
from schemas.exposition import Target, expose
from schemas.pauses import spare_what_is_loaded
from schemas.settings import ModelSettings, ServeSettings, WindowSettings
from schemas.sla import MetricsSettings


class FeatureModel:
    """One replica: an engine for each model version in use, and the thread that they run on.

    The caller has made the batch already, so there is no ``@serve.batch`` here. Calls that overlap
    queue in front of the engine's thread: while one computes, the next is on its way.

    Raises ConfigError in its constructor (see ``host_models``): Serve then reports the deployment
    as failed with that sentence.
    """

    def __init__(
        self, settings: ModelSettings, window: WindowSettings, *, exposes_metrics: bool = False
    ) -> None:
        self._thread = engine_thread()
        self._models = self._thread.submit(host_models, settings, window).result()
        self._target = self._expose() if exposes_metrics else None
        self._mappings = Mappings()
        spare_what_is_loaded()

    async def infer(
        self, windows: NDArray[np.float32], model_version: str | None = None
    ) -> Inference:
        """Takes float32 (B, C, T). Raises ValueError for another shape; the replica lives on."""
        loop = asyncio.get_running_loop()
        infer = self._models.infer
        return await loop.run_in_executor(self._thread, infer, windows, model_version)

    async def infer_shared(
        self, name: BlockName, shape: tuple[int, int, int], model_version: str | None = None
    ) -> Written | Inference | None:
        """As ``infer``, of the windows at the start of a block. The answer is written over them;
        one that has no room there is returned. None: this replica cannot see the block.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._thread, self._infer_shared, name, shape, model_version
        )

    async def describe(self) -> ModelDescription:
        """Of the version that serves."""
        return self._models.describe()

    async def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        """Loads and warms versions beside those at work; the first one serves from then on."""
        return await asyncio.to_thread(self._models.prepare, versions)

    async def statistics(self) -> EngineStatistics:
        """Of the one replica that answers."""
        return self._models.statistics()

    async def metrics_target(self) -> Target | None:
        """Where Prometheus finds this replica."""
        return self._target

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What Serve hands to the autoscaling policy: windows a second of this replica."""
        return {CAPACITY_METRIC: best_rate(self._models.describe().bucket_s)}

    async def check_health(self) -> None:
        """Runs the reference windows: raises, and so has the replica replaced, if they come out
        wrong or the device no longer answers. A few milliseconds, every ten seconds.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._models.check_reference)

    def _expose(self) -> Target:
        models = self._models
        REGISTRY.register(ModelCollector(models.statistics, models.calls))
        return expose("model", gpu=models.describe().device != "cpu")

    def _infer_shared(
        self, name: BlockName, shape: tuple[int, int, int], model_version: str | None
    ) -> Written | Inference | None:
        floats = self._mappings.open(name)
        if floats is None:
            return None
        windows = floats[: math.prod(shape)].reshape(shape)
        inference = self._models.infer(windows, model_version)
        return Written.over(floats, inference) or inference


def build_model_deployment(
    settings: ModelSettings,
    serve_settings: ServeSettings,
    *,
    window: WindowSettings | None = None,
    max_ongoing_requests: int = 16,
    metrics: MetricsSettings | None = None,
    version: str | None = None,
    autoscaling: dict[str, Any] | None = None,
) -> Application:
    """The Serve application of the model, ready for ``serve.run`` or for binding into a worker.

    Args:
        max_ongoing_requests: micro-batches at one replica, queued or computed. Beyond it a replica
            turns calls away, and Serve waits tens of milliseconds before it offers them again.
        metrics: replicas serve theirs if it names a port.
        version: deployed again under the same one, its replicas live on; none: they start again.
        autoscaling: Serve's ``autoscaling_config``, instead of ``model.num_replicas``.

    Raises ConfigError when CUDA is asked for without a share of a GPU: Ray would hide every GPU.
    """
    if settings.device == "cuda" and serve_settings.model_num_gpus == 0:
        raise ConfigError(
            "model.device is 'cuda', but serve.model_num_gpus is 0; "
            "set it to the share of a GPU that each replica takes, for example 0.5"
        )
    # A replica's working directory is not the user's.
    folders = {"artifact": settings.artifact, "store": settings.store}
    settings = settings.model_copy(
        update={name: folder.absolute() for name, folder in folders.items() if folder}
    )
    as_deployment = serve.deployment(
        name=MODEL_NAME,
        num_replicas=None if autoscaling else settings.num_replicas,
        autoscaling_config=autoscaling,
        max_ongoing_requests=max_ongoing_requests,
        ray_actor_options={
            "num_cpus": serve_settings.model_num_cpus,
            "num_gpus": serve_settings.model_num_gpus,
        },
        logging_config={"enable_access_log": False},  # else a line for every micro-batch
    )
    deployment = as_deployment(FeatureModel)
    return with_version(deployment, version).bind(
        settings, window or WindowSettings(), exposes_metrics=bool(metrics and metrics.port)
    )
