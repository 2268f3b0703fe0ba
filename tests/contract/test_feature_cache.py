"""The feature cache on the real Redis: what goes in comes out, and nothing else does."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
import redis as redis_client
from numpy.typing import NDArray

from inference.cache import FeatureCache
from inference.client import Inference, ModelDescription
from schemas.redis import RedisSettings
from schemas.settings import CacheSettings, Settings
from tapeline.processes import free_ports

VERSION = "m@1-00000000"
MODEL = ModelDescription(VERSION, "test-v1", 3, 7, 4, ("up",))


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def window(number: int) -> NDArray[np.float32]:
    return np.full((3, 7), number, np.float32)


def row(number: float, version: str = MODEL.model_version) -> Inference:
    made = np.arange(5, dtype=np.float32)[None] + number
    return Inference(made[:, :4].copy(), made[:, 4:].copy(), version)


@pytest.fixture
async def new_cache(settings: Settings) -> AsyncIterator[Callable[..., FeatureCache]]:
    """Caches of one key prefix, so that they share what is in Redis; closed at the end."""
    prefix = f"t{uuid.uuid4().hex}:"
    caches: list[FeatureCache] = []

    def new(
        url: str | None = settings.redis.url,
        model: ModelDescription = MODEL,
        chance: float = 0.5,
        clock: Callable[[], float] | None = None,
        **changes: Any,
    ) -> FeatureCache:
        fields = {"key_prefix": prefix, "recompute_share": 0.0} | changes
        cache = FeatureCache(
            CacheSettings(**fields),
            RedisSettings(url=url, timeout_ms=5000),
            model,
            clock=clock or Clock(),
            chance=lambda: chance,
        )
        caches.append(cache)
        return cache

    yield new
    for cache in caches:
        await cache.close()


async def kept(cache: FeatureCache, numbers: list[int]) -> list[bytes]:
    """Keys of windows whose rows the cache now holds, in Redis as well."""
    keys = [cache.key_of(window(number), VERSION) for number in numbers]
    cache.keep(keys, [row(number) for number in numbers], VERSION)
    await asyncio.gather(*cache._writes)
    return keys


def assert_row(found: Inference | None, number: int) -> None:
    assert found is not None
    assert found.cached
    assert found.model_version == MODEL.model_version
    np.testing.assert_array_equal(found.features, row(number).features)
    np.testing.assert_array_equal(found.scores, row(number).scores)
    assert found.features.dtype == np.float32


async def test_what_one_worker_computed_another_finds(
    new_cache: Callable[..., FeatureCache],
) -> None:
    first, second = new_cache(), new_cache()
    keys = await kept(first, [1, 2])
    found = await second.look_up([*keys, second.key_of(window(3), VERSION)], VERSION)
    assert_row(found[0], 1)
    assert_row(found[1], 2)
    assert found[2] is None
    assert (second.statistics().redis_hits, second.statistics().misses) == (2, 1)
    assert_row((await second.look_up(keys[:1], VERSION))[0], 1)
    assert second.statistics().memory_hits == 1, "it has learned it"


async def test_another_model_or_channel_set_has_other_keys(
    new_cache: Callable[..., FeatureCache],
) -> None:
    others = [
        ModelDescription("m@2-00000000", "test-v1", 3, 7, 4, ("up",)),
        ModelDescription("m@1-00000000", "test-v2", 3, 7, 4, ("up",)),
    ]
    keys = {
        new_cache(model=model).key_of(window(1), model.model_version) for model in [MODEL, *others]
    }
    assert len(keys) == 3
    cache = new_cache()
    key = cache.key_of(window(1), VERSION)
    cache.keep([key], [row(1, version="m@2-00000000")], VERSION)
    assert await cache.look_up([key], VERSION) == [None], (
        "made by a model that was swapped in meanwhile"
    )


def flipped(value: bytes) -> bytes:
    return value[:-1] + bytes([value[-1] ^ 1])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value, _: flipped(value),
        lambda value, _: value[:-4],
        lambda value, _: value + b"\0\0\0\0",
        lambda value, _: b"",
        lambda value, _: b"\x80\x05K\x03.",  # a pickle
        lambda value, _: b"XXXX" + value[4:],
        lambda _, other: other,  # whole, but another window's
    ],
    ids=["bit", "short", "long", "empty", "pickle", "magic", "another's"],
)
async def test_a_poisoned_value_is_rejected_and_overwritten(
    new_cache: Callable[..., FeatureCache],
    settings: Settings,
    spoil: Callable[[bytes, bytes], bytes],
) -> None:
    first = new_cache()
    key, other = await kept(first, [1, 2])
    assert settings.redis.url
    with redis_client.Redis.from_url(settings.redis.url) as client:
        name, other_name = first._name(key), first._name(other)
        client.set(name, spoil(client.get(name), client.get(other_name)))
        second = new_cache()
        assert await second.look_up([key], VERSION) == [None]
        assert second.statistics().rejected == 1
        await kept(second, [1])
        third = new_cache()
        assert_row((await third.look_up([key], VERSION))[0], 1)
        assert third.statistics().rejected == 0


async def test_what_is_too_old_is_computed_again(new_cache: Callable[..., FeatureCache]) -> None:
    clock = Clock()
    cache = new_cache(ttl_s=10, clock=clock, in_redis=False)
    keys = await kept(cache, [1])
    clock.now_s += 9.9
    assert_row((await cache.look_up(keys, VERSION))[0], 1)
    clock.now_s += 0.2
    assert await cache.look_up(keys, VERSION) == [None]
    assert cache.statistics().stale == 1
    assert cache.statistics().num_bytes == 0


async def test_redis_forgets_by_itself(
    new_cache: Callable[..., FeatureCache], settings: Settings
) -> None:
    cache = new_cache(ttl_s=1234)
    (key,) = await kept(cache, [1])
    assert settings.redis.url
    with redis_client.Redis.from_url(settings.redis.url) as client:
        assert 1200 < client.ttl(cache._name(key)) <= 1234


async def test_memory_is_bounded_and_the_longest_unused_leaves(
    new_cache: Callable[..., FeatureCache],
) -> None:
    cache = new_cache(in_redis=False, memory_mb=1)
    numbers = list(range(5000))
    keys = [cache.key_of(window(number), VERSION) for number in numbers]
    for key, number in zip(keys, numbers, strict=True):
        cache.keep([key], [row(number)], VERSION)
        await cache.look_up(keys[:1], VERSION)  # used all the time
    found = await cache.look_up([keys[0], keys[1], keys[-1]], VERSION)
    assert [one is not None for one in found] == [True, False, True]
    assert 900_000 < cache.statistics().num_bytes <= 1 << 20


async def test_without_redis_memory_answers_and_redis_is_asked_again(
    new_cache: Callable[..., FeatureCache],
) -> None:
    clock = Clock()
    nowhere = f"redis://127.0.0.1:{free_ports(1)[0]}/0"
    cache = new_cache(url=nowhere, clock=clock)
    keys = [cache.key_of(window(number), VERSION) for number in (1, 2)]
    assert await cache.look_up(keys, VERSION) == [None, None]
    assert cache.statistics().errors == 2
    cache.keep(keys[:1], [row(1)], VERSION)
    assert_row((await cache.look_up(keys[:1], VERSION))[0], 1)
    assert cache.statistics().errors == 3, "within a second it is left alone"
    clock.now_s += 1.1
    assert await cache.look_up(keys[1:], VERSION) == [None]
    assert cache.statistics().errors == 4


async def test_hits_are_checked_at_random(new_cache: Callable[..., FeatureCache]) -> None:
    assert new_cache(recompute_share=0.5, chance=0.4).is_to_be_checked()
    assert not new_cache(recompute_share=0.5, chance=0.6).is_to_be_checked()
    cache = new_cache()
    key = cache.key_of(window(1), VERSION)
    cache.check(key, row(1), row(1))
    assert (cache.statistics().recomputed, cache.statistics().mismatches) == (1, 0)
    cache.check(key, row(1), row(1.0000001192))
    assert (cache.statistics().recomputed, cache.statistics().mismatches) == (2, 1)
