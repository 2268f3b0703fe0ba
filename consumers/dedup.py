"""The first-seen table: which record showed an event id first.

An event is a duplicate only if its id was first seen at *another* offset. So a redelivery after a
crash is no duplicate and is never lost, and a replay drops exactly what the first pass dropped.
"""

import asyncio
import re
import zlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import structlog
from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import RedisError

from schemas.errors import ConfigError
from schemas.redis import RedisSettings

_ASKED_AT_ONCE = 2_000  # Lua takes no more than 8,000 arguments, and a page needs two for an id
_PAUSE_AFTER_FAILURE_S = 1.0  # a hanging Redis must not cost every micro-batch its timeout

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FirstSeenStatistics:
    """A snapshot: ids remembered here, ids asked of Redis, micro-batches without its answer."""

    num_local_ids: int
    redis_lookups_total: int
    redis_failures_total: int
    degraded: bool


class FirstSeen(Protocol):
    """Remembers, for every event id, the record that showed it first."""

    async def sightings(self, ids: Sequence[str], sources: Sequence[str]) -> list[str]:
        """The source (``topic:partition:offset``) that showed each id first; see ``take_over``.

        Ids not seen before are remembered with the source given. Never fails.
        """

    async def take_over(self, event_id: str, former: str, source: str) -> str:
        """Adds ``source`` behind ``former``, if that is the id's last one; returns all, with ``|``.

        For a dead letter that comes again, at another offset: once, however often it comes. The
        former one stays, because a replay must give its row to the window as the first pass did.
        """

    def statistics(self) -> FirstSeenStatistics: ...

    async def close(self) -> None: ...


class LocalFirstSeen:
    """A table of this process alone: ``max_ids`` ids, of which the longest unused leaves first."""

    def __init__(self, max_ids: int) -> None:
        self._max_ids = max_ids
        self._sources: OrderedDict[str, str] = OrderedDict()

    async def sightings(self, ids: Sequence[str], sources: Sequence[str]) -> list[str]:
        return self.remember_all(ids, sources)

    def remember_all(self, ids: Sequence[str], sources: Sequence[str]) -> list[str]:
        """Each id's first source; the one given if there was none."""
        first = list(map(self._sources.setdefault, ids, sources))
        for event_id in ids:
            self._sources.move_to_end(event_id)
        while len(self._sources) > self._max_ids:
            self._sources.popitem(last=False)
        return first

    def all_known(self, ids: Sequence[str]) -> list[str | None]:
        """Each id's first source, where it is remembered."""
        return list(map(self._sources.get, ids))

    def remember(self, event_id: str, source: str) -> str:
        """The id's first source; ``source`` itself if there was none."""
        return self.remember_all([event_id], [source])[0]

    def snapshot(self) -> list[tuple[str, str]]:
        """Ids and their first sources, the longest unused first."""
        return list(self._sources.items())

    def put(self, event_id: str, source: str) -> None:
        """Makes ``source`` the id's first source, whatever it was."""
        self._sources.pop(event_id, None)
        self.remember(event_id, source)

    async def take_over(self, event_id: str, former: str, source: str) -> str:
        known = self._sources.get(event_id)
        if known is not None and known.rpartition("|")[2] == former:
            self.put(event_id, f"{known}|{source}")
        return self.remember(event_id, source)

    def statistics(self) -> FirstSeenStatistics:
        return FirstSeenStatistics(len(self._sources), 0, 0, degraded=False)

    async def close(self) -> None:
        pass


# Ids are fields of two hashes, the newest page and the one before: a key for each id takes Redis
# more than twice the time and memory. A page is full after its time or with half of the ids, and
# then the former one goes. Idle, they expire a week later: Redis evicts what expires first, which
# should be the feature cache. `short_s`: the age of a page that was full before its time.
_PAGES = """
local ttl_s, max_ids = tonumber(ARGV[1]), tonumber(ARGV[2])
local life_s, short_s = 2 * ttl_s + 604800, 0
local pages = redis.call('HMGET', KEYS[1], 'newest', 'former')
local newest, former = pages[1], pages[2]
local left_s = newest and redis.call('TTL', newest) or -2
local is_full = left_s >= 0 and redis.call('HLEN', newest) > max_ids / 2
if is_full or life_s - left_s >= ttl_s then
  if is_full then short_s = life_s - left_s end
  if left_s >= 0 then
    if former then redis.call('UNLINK', former) end
    former = newest
  end
  local now = redis.call('TIME')
  newest = KEYS[1] .. ':' .. now[1] .. '.' .. now[2]
  redis.call('HSET', newest, '', '')
  redis.call('EXPIRE', newest, life_s)
  redis.call('HSET', KEYS[1], 'newest', newest)
  if former then redis.call('HSET', KEYS[1], 'former', former) end
  redis.call('EXPIRE', KEYS[1], life_s)
end
"""

# One argument for all ids: to write and read each by itself takes several times as long, here and
# in Redis. Backwards, so that of an id that comes twice the first source is what is kept.
_SET_OR_GET = """
local given = cmsgpack.unpack(ARGV[3])
local ids, sources, known, fresh, n = given[1], given[2], {}, {}, 0
local found = redis.call('HMGET', newest, unpack(ids))
local older = former and redis.call('HMGET', former, unpack(ids)) or {}
for i = #ids, 1, -1 do
  local first = found[i] or older[i]
  if first then
    known[#known + 1] = {i - 1, first}
  else
    fresh[n + 1], fresh[n + 2], n = ids[i], sources[i], n + 2
  end
end
if n > 0 then redis.call('HSET', newest, unpack(fresh)) end
return cmsgpack.pack({known, short_s})
"""

_TAKE_OVER = """
local id, taken, source = ARGV[3], ARGV[4], ARGV[5]
local page, known = newest, redis.call('HGET', newest, id)
if not known and former then
  page, known = former, redis.call('HGET', former, id)
end
if not known then
  page, known = newest, source
elseif string.match(known, '[^|]*$') == taken then
  known = known .. '|' .. source
end
redis.call('HSET', page, id, known)
return known
"""


class RedisFirstSeen:
    """A table that all workers share, behind a local one; one Lua call a micro-batch.

    While Redis is down the local table answers alone: duplicates that another worker saw first
    may pass, nothing is lost, and ``statistics`` says degraded. When it is back, whatever it has
    forgotten, it is told all that this table remembers.
    """

    def __init__(self, settings: RedisSettings) -> None:
        assert settings.url
        self._timeout_s = settings.timeout_ms / 1000
        self._shown_url = re.sub(r"//[^@/]*@", "//***@", settings.url)
        self._redis: Redis = Redis.from_url(
            settings.url,
            # One timeout for a whole call instead: the client's own makes a task of every write,
            # which is three rounds of a busy event loop.
            socket_timeout=None,
            socket_connect_timeout=self._timeout_s,
            single_connection_client=True,  # to take one from a pool takes as long as the call
        )
        self._set_or_get = self._redis.register_script(_PAGES + _SET_OR_GET)
        self._take_over = self._redis.register_script(_PAGES + _TAKE_OVER)
        self._pages = f"{settings.key_prefix}pages"
        self._bounds = [settings.ttl_s, settings.max_ids]
        self._local = LocalFirstSeen(settings.max_local_ids)
        self._lookups_total = 0
        self._failures_total = 0
        self._degraded = False
        self._ask_again_s = 0.0
        self._sharing: asyncio.Task[None] | None = None

    async def check(self) -> None:
        """Raises ConfigError unless Redis answers and is new enough."""
        try:
            async with asyncio.timeout(self._timeout_s):
                version = (await self._redis.info("server"))["redis_version"]
        except (RedisError, OSError, TimeoutError) as error:
            raise ConfigError(
                f"no Redis answers at {self._shown_url}: start one with `tapeline up`, or set "
                "TAPELINE_REDIS__URL (empty: duplicates are known to each worker alone)"
            ) from error
        if int(version.partition(".")[0]) < 7:
            raise ConfigError(f"Redis at {self._shown_url} is {version}; 7.0 or newer is needed")

    async def sightings(self, ids: Sequence[str], sources: Sequence[str]) -> list[str]:
        known = self._local.all_known(ids)
        asked = [index for index, source in enumerate(known) if source is None]
        if not asked:
            return [source for source in known if source is not None]
        if len(asked) == len(ids):
            return self._local.remember_all(ids, await self._ask(ids, sources))
        answers = await self._ask([ids[i] for i in asked], [sources[i] for i in asked])
        first = self._local.remember_all([ids[i] for i in asked], answers)
        for index, source in zip(asked, first, strict=True):
            known[index] = source
        return [source for source in known if source is not None]

    async def take_over(self, event_id: str, former: str, source: str) -> str:
        arguments: list[int | str] = [*self._bounds, event_id, former, source]
        answer = await self._call(lambda: self._run(self._take_over, arguments), num_ids=1)
        if answer is None:
            return await self._local.take_over(event_id, former, source)
        first: str = answer.decode()
        self._local.put(event_id, first)
        return first

    async def _ask(self, ids: Sequence[str], sources: Sequence[str]) -> list[str]:
        """What Redis saw first: for ids new to it the source given, while it is down for all."""
        if len(ids) > _ASKED_AT_ONCE:
            begin, rest = slice(_ASKED_AT_ONCE), slice(_ASKED_AT_ONCE, None)
            answers = await self._ask(ids[begin], sources[begin])
            return answers + await self._ask(ids[rest], sources[rest])
        first = list(sources)
        known = await self._call(lambda: self._put_absent(ids, sources), len(ids))
        for index, source in known or ():
            first[index] = source
        return first

    async def _put_absent(
        self, ids: Sequence[str], sources: Sequence[str]
    ) -> list[tuple[int, str]]:
        """Puts those ids into Redis that it has not seen; place and source of the others."""
        given = msgspec.msgpack.encode((ids, sources))
        answer = await self._run(self._set_or_get, [*self._bounds, given])
        known: list[tuple[int, str]]
        known, short_s = msgspec.msgpack.decode(answer)
        if short_s:
            _log.warning(
                "first_seen_forgets_early",
                remembered_s=short_s,
                wanted_s=self._bounds[0],
                hint="raise redis.max_ids, and give Redis 130 bytes for each",
            )
        return known

    async def _run(self, script: AsyncScript, arguments: Sequence[int | str | bytes]) -> Any:
        async with asyncio.timeout(self._timeout_s):
            return await script([self._pages], arguments)

    async def _call(self, call: Callable[[], Awaitable[Any]], num_ids: int) -> Any:
        """Redis's answer; None while it is down. Asks again once a second."""
        now_s = asyncio.get_running_loop().time()
        if now_s < self._ask_again_s:
            return None
        self._lookups_total += num_ids
        try:
            answer = await call()
        except (RedisError, OSError, TimeoutError) as error:
            self._failures_total += 1
            if not self._degraded:
                _log.warning("first_seen_degraded", error=str(error))
            self._degraded = True
            self._ask_again_s = now_s + _PAUSE_AFTER_FAILURE_S
            return None
        if self._degraded:
            _log.info("first_seen_restored")
            self._sharing = asyncio.create_task(self._share())
        self._degraded = False
        return answer

    async def _share(self) -> None:
        """Tells Redis the local table, oldest first; what Redis knows itself stays."""
        known = self._local.snapshot()
        for start in range(0, len(known), _ASKED_AT_ONCE):
            chunk = known[start : start + _ASKED_AT_ONCE]
            ids, sources = zip(*chunk, strict=True)
            try:
                await self._put_absent(ids, sources)
            except (RedisError, OSError, TimeoutError):
                return  # down again: the next time it is back begins anew

    def statistics(self) -> FirstSeenStatistics:
        return FirstSeenStatistics(
            self._local.statistics().num_local_ids,
            self._lookups_total,
            self._failures_total,
            self._degraded,
        )

    async def close(self) -> None:
        if self._sharing is not None:
            self._sharing.cancel()
        await self._redis.aclose()


class ShardedFirstSeen:
    """Several tables, each with a Redis of its own. An id's hash says whose it is."""

    def __init__(self, shards: Sequence[FirstSeen]) -> None:
        self._shards = shards

    async def sightings(self, ids: Sequence[str], sources: Sequence[str]) -> list[str]:
        rows: list[list[int]] = [[] for _ in self._shards]
        for row, event_id in enumerate(ids):
            rows[self._number(event_id)].append(row)
        answers = await asyncio.gather(
            *(
                shard.sightings([ids[row] for row in own], [sources[row] for row in own])
                for shard, own in zip(self._shards, rows, strict=True)
            )
        )
        first = list(sources)
        for own, answer in zip(rows, answers, strict=True):
            for row, source in zip(own, answer, strict=True):
                first[row] = source
        return first

    async def take_over(self, event_id: str, former: str, source: str) -> str:
        return await self._shards[self._number(event_id)].take_over(event_id, former, source)

    def statistics(self) -> FirstSeenStatistics:
        """Of all; degraded if one is."""
        each = [shard.statistics() for shard in self._shards]
        return FirstSeenStatistics(
            sum(one.num_local_ids for one in each),
            sum(one.redis_lookups_total for one in each),
            sum(one.redis_failures_total for one in each),
            any(one.degraded for one in each),
        )

    async def close(self) -> None:
        await asyncio.gather(*(shard.close() for shard in self._shards))

    def _number(self, event_id: str) -> int:
        """The same in every process, as Python's own hash is not."""
        return zlib.crc32(event_id.encode()) % len(self._shards)


async def open_first_seen(settings: RedisSettings) -> FirstSeen:
    """The table that the settings ask for. Raises ConfigError if a Redis does not answer."""
    if not settings.urls:
        return LocalFirstSeen(settings.max_local_ids)
    max_local_ids = max(1, settings.max_local_ids // len(settings.urls))
    tables = [
        RedisFirstSeen(settings.model_copy(update={"url": url, "max_local_ids": max_local_ids}))
        for url in settings.urls
    ]
    try:
        for table in tables:
            await table.check()
    except ConfigError:
        for table in tables:
            await table.close()
        raise
    return tables[0] if len(tables) == 1 else ShardedFirstSeen(tables)
