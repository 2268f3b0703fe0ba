"""A failed micro-batch is halved until the bad record is alone."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from consumers.bisection import infer_each
from inference.client import Inference
from schemas.errors import PoisonRecord, TransientError


class Model:
    """Answers each window with its own first value; fails with a window it does not like."""

    def __init__(self, disliked: set[int], unmade: set[int]) -> None:
        self._disliked, self._unmade = disliked, unmade
        self.num_calls = 0

    async def infer(self, windows: NDArray[np.float32]) -> Inference:
        self.num_calls += 1
        names = windows[:, 0, 0]
        if self._disliked & {int(name) for name in names}:
            raise RuntimeError("a window that I do not like")
        features = names[:, None].copy()
        features[[int(name) in self._unmade for name in names]] = np.nan
        return Inference(features, np.zeros((len(names), 0), np.float32), "v1")


@given(num_windows=st.integers(1, 40), data=st.data())
def test_exactly_the_bad_records_are_dead_letters(num_windows: int, data: st.DataObject) -> None:
    """Whatever the pattern; every other record has its own row, at a bounded number of calls."""
    names = st.sets(st.integers(0, num_windows - 1))
    disliked, unmade = data.draw(names), data.draw(names)
    model = Model(disliked, unmade)
    windows = np.arange(num_windows, dtype=np.float32)[:, None, None].repeat(2, axis=2)
    outcomes = asyncio.run(infer_each(model.infer, windows))
    assert len(outcomes) == num_windows
    assert model.num_calls <= 2 * num_windows - 1
    for name, outcome in enumerate(outcomes):
        if name in disliked | unmade:
            assert isinstance(outcome, PoisonRecord)
            reason = "model_error" if name in disliked else "not_finite"
            assert (outcome.stage, outcome.reason) == ("infer", reason)
        else:
            assert isinstance(outcome, tuple)
            inference, row = outcome
            assert inference.features[row, 0] == name


@pytest.mark.parametrize("error", [TransientError("away"), AssertionError("our bug")])
def test_what_is_no_records_fault_is_raised(error: Exception) -> None:
    async def fail(windows: NDArray[np.float32]) -> Inference:
        raise error

    with pytest.raises(type(error)):
        asyncio.run(infer_each(fail, np.zeros((4, 1, 1), np.float32)))
