"""Windows on their way to the model, past the cache: each is computed once, by whoever is first."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from consumers.bisection import Row
from inference.cache import FeatureCache
from inference.client import Inference
from schemas.errors import PoisonRecord

Outcome = Row | PoisonRecord
InferEach = Callable[[NDArray[np.float32]], Awaitable[list[Outcome]]]


class CachedInference:
    """Asks the cache for windows of lanes that want it, and the model for the rest.

    Micro-batches overlap: a window that another one is computing is waited for. Each computes its
    own before it waits for others', so none waits for ever; what another one failed at, it tries
    itself.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self._cache = cache
        self._computing: dict[bytes, asyncio.Future[Inference | None]] = {}

    async def infer_each(
        self,
        model_version: str,
        windows: NDArray[np.float32],
        wanted: Sequence[bool],
        infer_each: InferEach,
    ) -> list[Outcome]:
        """One outcome a window, in their order.

        Args:
            model_version: the one that ``infer_each`` asks.
            wanted: of which windows the cache may answer.
            infer_each: computes any number of windows; what it raises is raised.
        """
        keys = [
            self._cache.key_of(window, model_version) if want else None
            for window, want in zip(windows, wanted, strict=True)
        ]
        known = await self._known(keys, model_version)
        outcomes: dict[int, Outcome] = {}
        mine: list[int] = []
        theirs: dict[int, asyncio.Future[Inference | None]] = {}
        own: dict[bytes, asyncio.Future[Inference | None]] = {}
        for index, key in enumerate(keys):
            hit = known.get(index)
            if hit is not None and not self._cache.is_to_be_checked():
                outcomes[index] = (hit, 0)
            elif key is not None and key in self._computing:
                theirs[index] = self._computing[key]
            else:
                mine.append(index)
                if key is not None:
                    self._computing[key] = own[key] = asyncio.get_running_loop().create_future()
        try:
            made = await infer_each(windows[mine]) if mine else []
            outcomes.update(zip(mine, made, strict=True))
            self._learn(model_version, mine, keys, known, outcomes, own)
        finally:
            for key, future in own.items():
                del self._computing[key]
                if not future.done():
                    future.set_result(None)
        for index, future in theirs.items():
            row = await asyncio.shield(future)
            if row:
                outcomes[index] = (row, 0)
            else:
                [outcomes[index]] = await infer_each(windows[index : index + 1])
        return [outcomes[index] for index in range(len(windows))]

    async def _known(
        self, keys: Sequence[bytes | None], model_version: str
    ) -> dict[int, Inference]:
        asked = {index: key for index, key in enumerate(keys) if key is not None}
        found = await self._cache.look_up(list(asked.values()), model_version)
        return {index: row for index, row in zip(asked, found, strict=True) if row is not None}

    def _learn(
        self,
        model_version: str,
        mine: Sequence[int],
        keys: Sequence[bytes | None],
        known: dict[int, Inference],
        outcomes: dict[int, Outcome],
        own: dict[bytes, asyncio.Future[Inference | None]],
    ) -> None:
        kept: dict[bytes, Inference] = {}
        for index in mine:
            key, outcome = keys[index], outcomes[index]
            if key is None or isinstance(outcome, PoisonRecord):
                continue
            row = _alone(*outcome)
            if index in known:
                self._cache.check(key, known[index], row)
            kept[key] = row
            own[key].set_result(row)
        self._cache.keep(list(kept), list(kept.values()), model_version)


def _alone(inference: Inference, row: int) -> Inference:
    """One row as an inference of its own: it outlives the micro-batch."""
    return Inference(
        inference.features[row : row + 1].copy(),
        inference.scores[row : row + 1].copy(),
        inference.model_version,
    )
