"""The in-process inferencer, and what importing the client costs."""

import asyncio
import subprocess
import sys
import threading

import numpy as np
import pytest
from numpy.typing import NDArray
from stand_ins import FakeModel

from inference.client import Inference, LocalInferencer, ModelDescription

DESCRIPTION = ModelDescription("m@1", "test-v1", 2, 3, 4, ())
WINDOWS = np.zeros((1, 2, 3), np.float32)
DEADLINE_S = 10.0


def answer(windows: NDArray[np.float32]) -> Inference:
    rows = len(windows)
    return Inference(np.zeros((rows, 4), np.float32), np.zeros((rows, 0), np.float32), "m@1")


def test_the_event_loop_stays_free_while_the_engine_works() -> None:
    """The engine waits for what only the loop can do: on the loop's own thread it would hang."""
    loop_has_turned = threading.Event()

    def infer(windows: NDArray[np.float32]) -> Inference:
        assert loop_has_turned.wait(DEADLINE_S), "the event loop stood still"
        return answer(windows)

    async def main() -> Inference:
        inferencer = LocalInferencer(FakeModel(infer, DESCRIPTION))
        call = asyncio.create_task(inferencer.infer(WINDOWS))
        await asyncio.sleep(0)  # the call begins
        loop_has_turned.set()
        inference = await call
        assert await inferencer.describe() == DESCRIPTION
        await inferencer.close()
        return inference

    assert asyncio.run(main()).features.shape == (1, 4)


def test_the_engine_is_never_entered_twice() -> None:
    """Overlapping calls run one by one, in order, on one thread."""
    order: list[tuple[int, int]] = []
    inside = threading.Semaphore(1)

    def infer(windows: NDArray[np.float32]) -> Inference:
        assert inside.acquire(blocking=False), "two calls at once"
        order.append((len(windows), threading.get_ident()))
        inside.release()
        return answer(windows)

    async def main() -> None:
        inferencer = LocalInferencer(FakeModel(infer, DESCRIPTION))
        sizes = range(1, 30)
        batches = [np.zeros((size, 2, 3), np.float32) for size in sizes]
        results = await asyncio.gather(*[inferencer.infer(batch) for batch in batches])
        assert [len(result.features) for result in results] == list(sizes)
        await inferencer.close()

    asyncio.run(main())
    assert [size for size, _ in order] == list(range(1, 30))
    assert len({thread for _, thread in order}) == 1


def test_the_engine_s_error_is_the_caller_s() -> None:
    def infer(windows: NDArray[np.float32]) -> Inference:
        raise ValueError("windows must have shape")

    async def main() -> None:
        inferencer = LocalInferencer(FakeModel(infer, DESCRIPTION))
        with pytest.raises(ValueError, match="must have shape"):
            await inferencer.infer(WINDOWS)
        await inferencer.close()

    asyncio.run(main())


def test_the_client_imports_neither_torch_nor_ray() -> None:
    program = "import sys, inference.client; print(*({'torch', 'ray'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
