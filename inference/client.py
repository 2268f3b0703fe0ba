"""How the stream side reaches a model: one protocol, and the model in its own process.

Free of torch, so that a worker imports nothing that it does not run.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, eq=False)
class Inference:
    """What the model made of one micro-batch.

    Attributes:
        features: float32, shape (B, F), row i from window i. Read-only when it came from Serve.
        scores: float32, shape (B, S), columns in the order of ``ModelDescription.score_names``.
        model_version: of the model that made them.
        cached: they were made before, and kept.
    """

    features: NDArray[np.float32]
    scores: NDArray[np.float32]
    model_version: str
    cached: bool = False


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a caller must know before it sends the first window.

    Attributes:
        device: what it runs on, ``cpu`` or ``cuda``.
        bucket_s: seconds by batch bucket, as the engine measured them at its start; may be empty.
        max_batch: more windows in one call would take longer than ``model.max_call_ms``; None: so
            many were not tried.
    """

    model_version: str
    channels_version: str
    num_channels: int
    num_steps: int
    num_features: int
    score_names: tuple[str, ...]
    device: str = field(default="cpu", compare=False)
    bucket_s: Mapping[int, float] = field(default_factory=dict, compare=False)
    max_batch: int | None = field(default=None, compare=False)


def best_rate(bucket_s: Mapping[int, float]) -> float:
    """Windows a second at the best batch bucket; 0 where none was timed."""
    return max((size / seconds for size, seconds in bucket_s.items() if seconds), default=0.0)


class Inferencer(Protocol):
    """A model that takes whole micro-batches. Calls may overlap; the caller bounds how many."""

    async def infer(
        self, windows: NDArray[np.float32], model_version: str | None = None
    ) -> Inference:
        """Takes float32 (B, C, T), oldest step first.

        Args:
            model_version: the one that is to answer, prepared before; None: the one that serves.

        Raises:
            TransientError: the model is away, busy or late; the same call may work later.
            ValueError: windows of another shape or dtype, a bug of the caller.
        """

    async def describe(self) -> ModelDescription:
        """Of the version that serves. Raises TransientError while the model is away."""

    async def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        """Has these versions loaded and warm wherever calls may arrive, the first one to serve;
        its description. Takes seconds, while ``infer`` goes on.

        Raises:
            TransientError: as above.
            ConfigError: one of them cannot serve; everything stays as it was.
        """

    async def close(self) -> None:
        """Lets go of what this object owns. No call may follow."""


def engine_thread() -> ThreadPoolExecutor:
    """One thread, for one engine."""
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")


class BlockingModel(Protocol):
    """An ``Engine``, or several: its ``infer`` never overlaps itself."""

    def infer(
        self, windows: NDArray[np.float32], model_version: str | None = None
    ) -> Inference: ...

    def describe(self) -> ModelDescription: ...

    def prepare(self, versions: tuple[str, ...]) -> ModelDescription: ...


class LocalInferencer:
    """A blocking model in this process, on one thread of its own: the event loop stays free.

    Overlapping calls queue in front of that thread in the order of their start. A call whose task
    is cancelled while the model works still holds the thread until the model is done.

    Args:
        thread: the ``engine_thread`` that the model was loaded on, if any; closed with this.
    """

    def __init__(self, model: BlockingModel, thread: ThreadPoolExecutor | None = None) -> None:
        self._model = model
        self._thread = thread or engine_thread()

    async def infer(
        self, windows: NDArray[np.float32], model_version: str | None = None
    ) -> Inference:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._model.infer, windows, model_version)

    async def describe(self) -> ModelDescription:
        return self._model.describe()

    async def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        return await asyncio.to_thread(self._model.prepare, versions)

    async def close(self) -> None:
        """Drops calls that have not begun and waits for the one that has."""
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)
