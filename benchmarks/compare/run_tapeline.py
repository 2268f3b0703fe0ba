"""Tapeline's worker with the same model in its process; else as `tapeline worker` runs it.

It does more with an event than the others do: it drops duplicates (Redis), makes the 50 channels of
market50-v1, keeps order, and can rebuild its windows.
"""

import asyncio
import signal

import numpy as np
from numpy.typing import NDArray
from work import NUM_CHANNELS, NUM_FEATURES, NUM_STEPS, model

from consumers.dedup import open_first_seen
from consumers.worker import Worker
from inference.client import Inference, LocalInferencer, ModelDescription
from schemas.pauses import spare_what_is_loaded
from schemas.settings import load_settings


class Mean:
    """The comparison's model, as a worker asks for it."""

    def infer(self, windows: NDArray[np.float32], model_version: str | None = None) -> Inference:
        scores = np.empty((len(windows), 0), np.float32)
        return Inference(model(windows), scores, "mean@1")

    def describe(self) -> ModelDescription:
        return ModelDescription("mean@1", "market50-v1", NUM_CHANNELS, NUM_STEPS, NUM_FEATURES, ())

    def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        return self.describe()


async def main() -> None:
    settings = load_settings()
    worker = Worker(settings, LocalInferencer(Mean()), await open_first_seen(settings.redis))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    spare_what_is_loaded()
    await worker.run()


if __name__ == "__main__":
    asyncio.run(main())
