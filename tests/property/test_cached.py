"""Micro-batches past the cache: the outcomes of the model, each window computed once."""

import asyncio
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from consumers.cached import CachedInference, Outcome
from inference.cache import FeatureCache
from inference.client import Inference, ModelDescription
from schemas.errors import PoisonRecord, TransientError
from schemas.redis import RedisSettings
from schemas.settings import CacheSettings

VERSION = "m@1-00000000"
MODEL = ModelDescription(VERSION, "test-v1", 1, 2, 2, ())
Windows = NDArray[np.float32]


class Model:
    """Doubles what it sees; 13 is poison. Notes every window that it is asked for."""

    def __init__(self) -> None:
        self.asked: Counter[float] = Counter()
        self.num_failures = 0

    async def infer_each(self, windows: Windows) -> list[Outcome]:
        self.asked.update(windows[:, 0, 0].tolist())
        await asyncio.sleep(0)  # others go on meanwhile
        if self.num_failures:
            self.num_failures -= 1
            raise TransientError("planted")
        inference = Inference(windows[:, 0, :] * 2, windows[:, 0, :0], MODEL.model_version)
        return [
            PoisonRecord("infer", "planted", "13") if number == 13 else (inference, index)
            for index, number in enumerate(windows[:, 0, 0].tolist())
        ]


def batch_of(numbers: list[int]) -> Windows:
    return np.array(numbers, np.float32)[:, None, None] * np.ones((1, 1, 2), np.float32)


def new_cache(recompute_share: float = 0.0) -> FeatureCache:
    cache_settings = CacheSettings(in_redis=False, recompute_share=recompute_share)
    return FeatureCache(cache_settings, RedisSettings(url=None), MODEL, chance=lambda: 0.0)


def assert_outcomes(outcomes: list[Outcome], numbers: list[int]) -> None:
    assert len(outcomes) == len(numbers)
    for outcome, number in zip(outcomes, numbers, strict=True):
        if number == 13:
            assert isinstance(outcome, PoisonRecord)
        else:
            assert not isinstance(outcome, PoisonRecord)
            inference, row = outcome
            assert inference.features[row].tolist() == [2 * number, 2 * number]


a_batch = st.lists(st.tuples(st.integers(10, 15), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(batches=st.lists(a_batch, min_size=1, max_size=5), in_turn=st.booleans())
def test_overlapping_batches_get_the_model_s_outcomes_and_ask_once(
    batches: list[list[tuple[int, bool]]], in_turn: bool
) -> None:
    model = Model()
    cached = CachedInference(new_cache())

    async def run_one(batch: list[tuple[int, bool]]) -> list[Outcome]:
        numbers, wanted = [one for one, _ in batch], [want for _, want in batch]
        return await cached.infer_each(VERSION, batch_of(numbers), wanted, model.infer_each)

    async def run_all() -> list[list[Outcome]]:
        if in_turn:
            return [await run_one(batch) for batch in batches]
        return await asyncio.gather(*map(run_one, batches))

    for outcomes, batch in zip(asyncio.run(run_all()), batches, strict=True):
        assert_outcomes(outcomes, [one for one, _ in batch])
    for number in range(10, 16):
        times_wanted = sum(one == (number, True) for batch in batches for one in batch)
        times_not = sum(one == (number, False) for batch in batches for one in batch)
        if number == 13:  # poison is not kept
            assert times_not <= model.asked[number] <= times_wanted + times_not
        else:
            assert model.asked[number] == times_not + min(times_wanted, 1)
    assert not cached._computing


async def test_what_another_batch_failed_at_is_tried_again() -> None:
    model, cached = Model(), CachedInference(new_cache())
    model.num_failures = 1
    first, second = await asyncio.gather(
        cached.infer_each(VERSION, batch_of([1]), [True], model.infer_each),
        cached.infer_each(VERSION, batch_of([1, 2]), [True, True], model.infer_each),
        return_exceptions=True,
    )
    assert isinstance(first, TransientError)
    assert isinstance(second, list)
    assert_outcomes(second, [1, 2])
    assert not cached._computing


async def test_a_cancelled_batch_leaves_nothing_behind() -> None:
    model, cached = Model(), CachedInference(new_cache())
    task = asyncio.create_task(cached.infer_each(VERSION, batch_of([1]), [True], model.infer_each))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not cached._computing
    assert_outcomes(await cached.infer_each(VERSION, batch_of([1]), [True], model.infer_each), [1])


async def test_a_checked_hit_is_computed_again_and_is_not_marked() -> None:
    model, cache = Model(), new_cache(recompute_share=1.0)
    cached = CachedInference(cache)
    for _ in range(3):
        outcomes = await cached.infer_each(VERSION, batch_of([1]), [True], model.infer_each)
        assert_outcomes(outcomes, [1])
        assert not outcomes[0][0].cached  # type: ignore[index]
    assert model.asked[1] == 3
    assert (cache.statistics().recomputed, cache.statistics().mismatches) == (2, 0)


async def test_only_hits_are_marked() -> None:
    model, cached = Model(), CachedInference(new_cache())
    await cached.infer_each(VERSION, batch_of([1]), [True], model.infer_each)
    outcomes = await cached.infer_each(
        VERSION, batch_of([1, 2, 1]), [True, True, False], model.infer_each
    )
    assert [one[0].cached for one in outcomes] == [True, False, False]  # type: ignore[index]
