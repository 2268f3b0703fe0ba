"""Features of windows seen before: in memory, then in Redis. For backfills that run again.

A key is a hash of the window's bytes, the model version and the channel set, so nothing else can
answer for it. A value is raw float32 behind a header with a checksum; one that does not hold is
rejected, counted and overwritten, never served.
"""

import asyncio
import hashlib
import random
import struct
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray
from redis.asyncio import Redis
from redis.exceptions import RedisError

from inference.client import Inference, ModelDescription
from schemas.redis import RedisSettings
from schemas.settings import CacheSettings

_HEADER = struct.Struct("<4sIII")  # magic, number of features, of scores, crc32 of key and values
_MAGIC = b"TLF1"
_KEY_BYTES = 16
_OVERHEAD_BYTES = 300  # of an entry in memory, beside its value
_PAUSE_AFTER_FAILURE_S = 1.0
_MAX_WRITES = 8  # to Redis at once; more are left out, and counted

_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class CacheStatistics:
    """What a worker's cache did since its start, in windows.

    Attributes:
        stale: found, but older than ``cache.ttl_s``.
        rejected: found in Redis, but not as it was written.
        errors: not asked or not kept because Redis did not answer, or not quickly enough.
        recomputed: served by the model though they were known, to compare.
        mismatches: of those, other bits than the cache's.
        num_bytes: in memory, about.
    """

    memory_hits: int = 0
    redis_hits: int = 0
    misses: int = 0
    stale: int = 0
    rejected: int = 0
    errors: int = 0
    recomputed: int = 0
    mismatches: int = 0
    num_bytes: int = 0

    @property
    def hits(self) -> int:
        return self.memory_hits + self.redis_hits


class FeatureCache:
    """One worker's memory, in front of a Redis that all workers share.

    Redis is asked once a micro-batch and written to in the background. While it does not answer,
    memory answers alone, and Redis is asked again once a second.

    Args:
        model: what the features to be kept are like; any version that gives such ones.
        clock: seconds, only forward.
        chance: between 0 and 1, for the share of hits that are computed again.
    """

    def __init__(
        self,
        settings: CacheSettings,
        redis: RedisSettings,
        model: ModelDescription,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._settings = settings
        self._channels_version = model.channels_version
        self._num_features = model.num_features
        self._num_scores = len(model.score_names)
        self._clock = clock
        self._chance = chance
        self._max_bytes = settings.memory_mb << 20
        self._memory: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()  # until when, value
        self._redis: Redis | None = None
        if settings.in_redis and redis.url:
            timeout_s = redis.timeout_ms / 1000
            self._redis = Redis.from_url(
                redis.url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
            )
        self._ask_again_s = 0.0
        self._writes: set[asyncio.Task[None]] = set()
        self._counts = CacheStatistics()

    def key_of(self, window: NDArray[np.float32], model_version: str) -> bytes:
        """16 bytes that stand for this window under this model version."""
        content = np.ascontiguousarray(window).data
        identity = _identity(model_version, self._channels_version)
        return hashlib.blake2b(content, digest_size=_KEY_BYTES, key=identity).digest()

    async def look_up(self, keys: Sequence[bytes], model_version: str) -> list[Inference | None]:
        """What is known, one a key: of one row, marked ``cached``; None has to be computed.

        Args:
            model_version: the one that the keys are of.
        """
        values = [self._remembered(key) for key in keys]
        asked = [index for index, value in enumerate(values) if value is None]
        in_redis = await self._ask([keys[index] for index in asked])
        for index, value in zip(asked, in_redis, strict=True):
            values[index] = value
            if value is not None:
                self._remember(keys[index], value)
        self._counts.redis_hits += sum(value is not None for value in in_redis)
        self._counts.memory_hits += len(keys) - len(asked)
        self._counts.misses += sum(value is None for value in in_redis)
        return [
            None if value is None else self._inference(value, model_version) for value in values
        ]

    def is_to_be_checked(self) -> bool:
        """Whether this hit is among those that are computed again."""
        return self._chance() < self._settings.recompute_share

    def check(self, key: bytes, known: Inference, computed: Inference) -> None:
        """Notes whether the cache gave what the model gives."""
        self._counts.recomputed += 1
        if self._value(key, known) != self._value(key, computed):
            self._counts.mismatches += 1
            _log.warning("cache_mismatch", key=key.hex(), model_version=computed.model_version)

    def keep(self, keys: Sequence[bytes], rows: Sequence[Inference], model_version: str) -> None:
        """Remembers rows, of one window each; what another model version made than the one that
        the keys are of is not kept.
        """
        values = {
            key: self._value(key, row)
            for key, row in zip(keys, rows, strict=True)
            if row.model_version == model_version
        }
        for key, value in values.items():
            self._remember(key, value)
        if not values or self._redis is None:
            return
        if len(self._writes) >= _MAX_WRITES or self._clock() < self._ask_again_s:
            self._counts.errors += len(values)
            return
        writing = asyncio.create_task(self._write(self._redis, values))
        self._writes.add(writing)
        writing.add_done_callback(self._writes.discard)

    def statistics(self) -> CacheStatistics:
        return replace(self._counts)

    async def close(self) -> None:
        """Waits for what is being written."""
        await asyncio.gather(*self._writes)
        if self._redis is not None:
            await self._redis.aclose()

    def _remembered(self, key: bytes) -> bytes | None:
        found = self._memory.get(key)
        if found is None:
            return None
        until_s, value = found
        if self._clock() >= until_s:
            self._counts.stale += 1
            self._forget(key)
            return None
        self._memory.move_to_end(key)
        return value

    def _remember(self, key: bytes, value: bytes) -> None:
        if key in self._memory:
            self._forget(key)
        self._memory[key] = (self._clock() + self._settings.ttl_s, value)
        self._counts.num_bytes += len(value) + _OVERHEAD_BYTES
        while self._counts.num_bytes > self._max_bytes:
            self._forget(next(iter(self._memory)))

    def _forget(self, key: bytes) -> None:
        _, value = self._memory.pop(key)
        self._counts.num_bytes -= len(value) + _OVERHEAD_BYTES

    async def _ask(self, keys: list[bytes]) -> list[bytes | None]:
        if not keys or self._redis is None:
            return [None] * len(keys)
        if self._clock() < self._ask_again_s:
            self._counts.errors += len(keys)
            return [None] * len(keys)
        try:
            found: list[Any] = await self._redis.mget([self._name(key) for key in keys])
        except (RedisError, OSError, TimeoutError) as error:
            self._fail(len(keys), error)
            return [None] * len(keys)
        return [
            value if value is not None and self._holds(key, value) else None
            for key, value in zip(keys, found, strict=True)
        ]

    async def _write(self, redis: Redis, values: dict[bytes, bytes]) -> None:
        pipeline = redis.pipeline(transaction=False)
        for key, value in values.items():
            pipeline.set(self._name(key), value, ex=self._settings.ttl_s)
        try:
            await pipeline.execute()
        except (RedisError, OSError, TimeoutError) as error:
            self._fail(len(values), error)

    def _fail(self, num_windows: int, error: Exception) -> None:
        self._counts.errors += num_windows
        self._ask_again_s = self._clock() + _PAUSE_AFTER_FAILURE_S
        _log.warning("cache_without_redis", error=str(error))

    def _name(self, key: bytes) -> str:
        return self._settings.key_prefix + key.hex()

    def _value(self, key: bytes, row: Inference) -> bytes:
        made = np.concatenate([row.features.ravel(), row.scores.ravel()]).astype("<f4")
        return self._sealed(key, made.tobytes())

    def _sealed(self, key: bytes, values: bytes) -> bytes:
        checksum = zlib.crc32(values, zlib.crc32(key))
        return _HEADER.pack(_MAGIC, self._num_features, self._num_scores, checksum) + values

    def _holds(self, key: bytes, value: bytes) -> bool:
        """Whether this is what ``_value`` writes for this key and model."""
        values = value[_HEADER.size :]
        is_whole = len(values) == 4 * (self._num_features + self._num_scores)
        is_ours = is_whole and value == self._sealed(key, values)
        if is_ours and np.isfinite(np.frombuffer(values, "<f4")).all():
            return True
        self._counts.rejected += 1
        _log.warning("cache_value_rejected", key=key.hex(), num_bytes=len(value))
        return False

    def _inference(self, value: bytes, model_version: str) -> Inference:
        made = np.frombuffer(value, "<f4", offset=_HEADER.size)[None]
        features, scores = np.split(made, [self._num_features], axis=1)
        return Inference(features, scores, model_version, cached=True)


@lru_cache(maxsize=16)
def _identity(model_version: str, channels_version: str) -> bytes:
    identity = f"{model_version}\n{channels_version}".encode()
    return hashlib.blake2b(identity, digest_size=64).digest()
