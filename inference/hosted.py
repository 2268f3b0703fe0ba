"""The model versions of one process: several engines, each warm, and which one answers."""

import threading
import time
from collections.abc import Callable

import numpy as np
import structlog
from numpy.typing import NDArray

from inference.client import Inference, ModelDescription
from inference.engine import Engine, EngineStatistics, build_engine, load_engine
from inference.metrics import CallMeter
from inference.store import ModelStore
from schemas.errors import ConfigError
from schemas.placement import pin_thread
from schemas.settings import ModelSettings, WindowSettings

_log = structlog.get_logger(__name__)


class HostedModels:
    """One engine that serves, and others beside it.

    ``infer`` blocks and must not overlap; ``prepare`` may run meanwhile on another thread: new
    versions are loaded and warmed beside those at work.

    Args:
        serving: the first that serves.
        load: what makes an engine of a ``model_version``; None: there is no other.
    """

    def __init__(self, serving: Engine, load: Callable[[str], Engine] | None = None) -> None:
        self._serving = serving
        self._engines = {serving.model_version: serving}
        self._load = load
        self._loading = threading.Lock()
        self.calls = CallMeter()

    def infer(self, windows: NDArray[np.float32], model_version: str | None = None) -> Inference:
        """As ``Engine.infer``, by that version; None: by the one that serves.

        Raises ConfigError if there is no such version.
        """
        engine = self._serving if model_version is None else self._engine(model_version)
        begun_s = time.perf_counter()
        inference = engine.infer(windows)
        self.calls.observe(len(windows), time.perf_counter() - begun_s)
        return inference

    def describe(self) -> ModelDescription:
        """Of the version that serves."""
        return self._serving.describe()

    def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        """Has these ready and the first one serve; returns its description.

        The version that served until now stays for calls that are on their way, others are dropped.

        Raises ConfigError, and changes nothing, if one of them cannot be loaded.
        """
        ready = {version: self._engine(version) for version in versions}
        with self._loading:
            self._engines = {self._serving.model_version: self._serving} | ready
        self._serving = ready[versions[0]]
        return self._serving.describe()

    def statistics(self) -> EngineStatistics:
        """Of the version that serves."""
        return self._serving.statistics()

    def check_reference(self) -> None:
        """Of the version that serves; see ``Engine``."""
        self._serving.check_reference()

    def _engine(self, model_version: str) -> Engine:
        """The engine of that version, loaded here and now if it is not there."""
        if (engine := self._engines.get(model_version)) is not None:
            return engine
        with self._loading:
            if (engine := self._engines.get(model_version)) is not None:
                return engine
            if self._load is None:
                raise ConfigError(f"{model_version} is not here, and there is no model.store")
            engine = self._load(model_version)
            self._engines = {**self._engines, model_version: engine}
            _log.info("model_loaded", model_version=model_version)
            return engine


def host_models(settings: ModelSettings, window: WindowSettings) -> HostedModels:
    """What ``model.store`` has in use, or the one model that the settings name. Takes seconds.

    Pins the calling thread to ``model.cpu_affinity``: call it on the engines' own.

    Raises ConfigError: see ``load_engine``; or the store has nothing in use.
    """
    if settings.store is None:
        return HostedModels(load_engine(settings, window))
    pin_thread("model.cpu_affinity", settings.cpu_affinity)  # torch's threads inherit it
    store = ModelStore(settings.store)
    versions = store.rollout().versions

    def load(model_version: str) -> Engine:
        return build_engine(store.load(model_version, window), settings)

    models = HostedModels(load(versions[0]), load)
    models.prepare(versions)
    return models
