"""A model version that sees what the others see, and is only compared with them."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import structlog
from numpy.typing import NDArray

from consumers.bisection import Row
from inference.client import Inferencer
from schemas.errors import PoisonRecord

_MAX_WINDOWS = 32  # of a call: a micro-batch that comes meanwhile waits for so many at most
_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class ShadowStatistics:
    """What a shadow version gave, since it became one.

    Attributes:
        num_windows: computed and compared.
        num_skipped: not computed, because something else waited for the model.
        num_failed: it raised, or gave NaN or infinity.
        seconds: that its calls took.
        max_difference: the largest absolute difference of a feature or score from what was served.
        sum_difference: of the mean absolute differences, window by window.
    """

    model_version: str | None = None
    num_windows: int = 0
    num_skipped: int = 0
    num_failed: int = 0
    num_calls: int = 0
    seconds: float = 0.0
    max_difference: float = 0.0
    sum_difference: float = 0.0


@dataclass(slots=True)
class Shadow:
    """At most one call at a time, and only while nothing else wants the model.

    Args:
        is_model_free: whether no call is at the model and no record waits for one.
    """

    inferencer: Inferencer
    is_model_free: Callable[[], bool]
    _counts: ShadowStatistics = field(default_factory=ShadowStatistics)
    _calling: asyncio.Task[None] | None = None

    def statistics(self) -> ShadowStatistics:
        return replace(self._counts)

    def offer(
        self,
        model_version: str | None,
        windows: NDArray[np.float32],
        served: Sequence[Row | PoisonRecord],
    ) -> None:
        """Windows that were just answered; compares the first of them if there is time.

        Args:
            model_version: the shadow; None: there is none.
        """
        if model_version != self._counts.model_version:
            self._counts = ShadowStatistics(model_version)
        if model_version is None:
            return
        is_calling = self._calling is not None and not self._calling.done()
        if is_calling or not self.is_model_free():
            self._counts.num_skipped += len(windows)
            return
        self._counts.num_skipped += max(0, len(windows) - _MAX_WINDOWS)
        compared = self._compare(model_version, windows[:_MAX_WINDOWS], served[:_MAX_WINDOWS])
        self._calling = asyncio.create_task(compared)

    async def close(self) -> None:
        """Ends a call that is on its way."""
        if self._calling is not None:
            self._calling.cancel()
            await asyncio.gather(self._calling, return_exceptions=True)

    async def _compare(
        self, model_version: str, windows: NDArray[np.float32], served: Sequence[Row | PoisonRecord]
    ) -> None:
        counts = self._counts
        begun_s = time.monotonic()
        try:
            made = await self.inferencer.infer(windows, model_version)
        except Exception as error:  # whatever it raises, nobody waits for it
            counts.num_failed += len(windows)
            _log.warning("shadow_failed", model_version=model_version, error=str(error))
            return
        counts.seconds += time.monotonic() - begun_s
        counts.num_calls += 1
        outputs = np.concatenate([made.features, made.scores], axis=1)
        for mine, row in zip(outputs, served, strict=True):
            if isinstance(row, PoisonRecord) or not np.isfinite(mine).all():
                counts.num_failed += 1
                continue
            inference, index = row
            theirs = np.concatenate([inference.features[index], inference.scores[index]])
            difference = np.abs(mine - theirs)
            counts.num_windows += 1
            counts.max_difference = max(counts.max_difference, float(difference.max()))
            counts.sum_difference += float(difference.mean())
