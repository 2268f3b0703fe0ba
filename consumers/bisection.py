"""Inference that a bad record cannot stop: a failed micro-batch is halved until it is alone."""

from collections.abc import Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from inference.client import Inference
from schemas.errors import ConfigError, PoisonRecord, TransientError

Row = tuple[Inference, int]
"""What the model made of one window: a row of an inference."""

_NOT_THE_RECORDS = (TransientError, ConfigError, AssertionError)


async def infer_each(
    infer: Callable[[NDArray[np.float32]], Awaitable[Inference]], windows: NDArray[np.float32]
) -> list[Row | PoisonRecord]:
    """One outcome a window, in their order: its row, or why it is a dead letter.

    Costs one call as long as nothing fails, at most 2B - 1 for B windows. A row's bits do not
    depend on what shares its call (docs/DESIGN.md, 3.3), so halving changes none.

    Raises what is not a record's fault: TransientError, ConfigError, AssertionError.
    """
    try:
        inference = await infer(windows)
    except _NOT_THE_RECORDS:
        raise
    except Exception as error:  # whatever a user's model raises
        if len(windows) == 1:
            return [_poison("model_error", f"the model fails on it alone: {error!r}", error)]
        middle = len(windows) // 2
        return [
            *await infer_each(infer, windows[:middle]),
            *await infer_each(infer, windows[middle:]),
        ]
    made = np.concatenate([inference.features, inference.scores], axis=1)
    finite: NDArray[np.bool_] = np.isfinite(made).all(axis=1, keepdims=True)[:, 0]
    if finite.all():
        return [(inference, row) for row in range(len(windows))]
    return [
        (inference, row) if is_finite else _poison("not_finite", "the model made NaN or infinity")
        for row, is_finite in enumerate(finite.tolist())
    ]


def _poison(reason: str, text: str, cause: Exception | None = None) -> PoisonRecord:
    poison = PoisonRecord("infer", reason, text)
    poison.__cause__ = cause
    return poison
