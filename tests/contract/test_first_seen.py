"""The first-seen table, in one process, in Redis and in two: one suite, on the real Redis."""

import asyncio
import os
import signal
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis as redis_client
import structlog
from hypothesis import given
from hypothesis import strategies as st

from consumers.dedup import (
    FirstSeen,
    LocalFirstSeen,
    RedisFirstSeen,
    ShardedFirstSeen,
    open_first_seen,
)
from schemas.errors import ConfigError
from schemas.redis import RedisSettings
from schemas.settings import load_settings
from tapeline.processes import free_ports
from tapeline.stack import Stack

MAX_IDS = 5
TTL_S = 1234
LONG_S = 30.0

OpenTable = Callable[..., Awaitable[FirstSeen]]


def new_settings(url: str | None, **changes: object) -> RedisSettings:
    """With a key prefix of its own: tests share a Redis."""
    # A slow machine must not look like a dead Redis.
    fields = {"url": url, "key_prefix": f"t{uuid.uuid4().hex}:", "ttl_s": TTL_S, "timeout_ms": 5000}
    return RedisSettings.model_validate(fields | {"max_local_ids": MAX_IDS} | changes)


@pytest.fixture
async def open_table() -> AsyncIterator[OpenTable]:
    """Opens tables of given settings; closes them."""
    tables: list[FirstSeen] = []

    async def open_(settings: RedisSettings) -> FirstSeen:
        tables.append(await open_first_seen(settings))
        return tables[-1]

    yield open_
    for table in tables:
        await table.close()


KINDS = {"local": LocalFirstSeen, "redis": RedisFirstSeen, "shards": ShardedFirstSeen}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def table_settings(kind: str, request: pytest.FixtureRequest) -> RedisSettings:
    """Two databases of one server have nothing in common: they are two servers to a table."""
    url = None if kind == "local" else str(request.getfixturevalue("redis_url"))
    more_urls = [second_database(url)] if url and kind == "shards" else []
    return new_settings(url, more_urls=more_urls)


def second_database(url: str) -> str:
    return f"{url.rpartition('/')[0]}/1"


@pytest.fixture
async def table(table_settings: RedisSettings, open_table: OpenTable) -> FirstSeen:
    return await open_table(table_settings)


# All of them.


def test_settings_say_which_table(table: FirstSeen, kind: str) -> None:
    assert isinstance(table, KINDS[kind])
    assert not table.statistics().degraded


async def test_first_sighting_is_its_own_source(table: FirstSeen) -> None:
    assert await table.sightings(["a", "b"], ["t:0:1", "t:0:2"]) == ["t:0:1", "t:0:2"]
    assert table.statistics().num_local_ids == 2


async def test_redelivery_is_its_own_first_sighting(table: FirstSeen) -> None:
    """The same record again after a crash: no duplicate, so it is not lost."""
    for _ in range(3):
        assert await table.sightings(["a"], ["t:0:1"]) == ["t:0:1"]


async def test_duplicate_shows_the_first_source(table: FirstSeen) -> None:
    await table.sightings(["a"], ["t:0:1"])
    assert await table.sightings(["b", "a"], ["t:0:2", "t:0:3"]) == ["t:0:2", "t:0:1"]
    assert await table.sightings(["a"], ["other:7:1"]) == ["t:0:1"]


async def test_duplicates_inside_one_batch(table: FirstSeen) -> None:
    ids, sources = ["a", "b", "a", "a"], ["t:0:1", "t:0:2", "t:0:3", "t:1:0"]
    assert await table.sightings(ids, sources) == ["t:0:1", "t:0:2", "t:0:1", "t:0:1"]


async def test_replay_drops_what_the_first_pass_dropped(table: FirstSeen) -> None:
    ids, sources = ["a", "b", "a"], ["t:0:1", "t:0:2", "t:0:3"]
    first_pass = await table.sightings(ids, sources)
    assert await table.sightings(ids, sources) == first_pass
    assert await table.sightings(ids[2:], sources[2:]) == first_pass[2:], "in smaller batches, too"


async def test_nothing_asked_nothing_answered(table: FirstSeen) -> None:
    assert await table.sightings([], []) == []


async def test_local_memory_is_bounded(table: FirstSeen, kind: str) -> None:
    """A batch larger than the table is answered all the same. Shards have equal parts of it."""
    ids = [f"id-{number}" for number in range(3 * MAX_IDS)]
    sources = [f"t:0:{number}" for number in range(3 * MAX_IDS)]
    assert await table.sightings(ids, sources) == sources
    assert table.statistics().num_local_ids == (2 * (MAX_IDS // 2) if kind == "shards" else MAX_IDS)


async def test_odd_ids_are_ids(table: FirstSeen) -> None:
    ids = ["ÄÖÜ", " ", "a\0b", "{tag}", "x" * 128]
    sources = [f"t:0:{number}" for number in range(len(ids))]
    assert await table.sightings(ids, sources) == sources
    assert await table.sightings(ids, ["t:9:9"] * len(ids)) == sources


# The local one.


async def test_longest_unused_id_leaves_first() -> None:
    table = LocalFirstSeen(3)
    await table.sightings(["a", "b", "c"], ["1", "2", "3"])
    await table.sightings(["a"], ["4"])  # used again
    await table.sightings(["d"], ["5"])  # b leaves
    assert table.all_known("abcd") == ["1", None, "3", "5"]


@given(ids=st.lists(st.sampled_from("abcdefgh"), max_size=60), max_ids=st.integers(1, 10))
def test_table_is_a_bounded_lru(ids: list[str], max_ids: int) -> None:
    table = LocalFirstSeen(max_ids)
    model: list[tuple[str, str]] = []  # longest unused first
    for number, one in enumerate(ids):
        first = dict(model).get(one, str(number))
        model = [*(pair for pair in model if pair[0] != one), (one, first)][-max_ids:]
        assert table.remember(one, str(number)) == first
        assert table.statistics().num_local_ids == len(model)
    assert {one: table.all_known([one])[0] for one, _ in model} == dict(model)


# The one in Redis.


async def test_redis_remembers_what_the_local_table_forgot(
    redis_url: str, open_table: OpenTable
) -> None:
    table = await open_table(new_settings(redis_url, max_local_ids=1))
    await table.sightings(["a", "b", "c"], ["t:0:1", "t:0:2", "t:0:3"])
    assert await table.sightings(["a"], ["t:0:9"]) == ["t:0:1"]


class Pages:
    """What a table has in Redis, looked at and aged from outside."""

    def __init__(self, redis: "redis_client.Redis", settings: RedisSettings) -> None:
        self._redis = redis
        self._prefix = settings.key_prefix

    def ids(self) -> list[set[str]]:
        """Of each page, the oldest first."""
        names = sorted(self._redis.keys(f"{self._prefix}pages:*"))
        return [{one.decode() for one in self._redis.hkeys(name)} - {""} for name in names]

    def age(self, seconds: int) -> None:
        """Makes all that there is older."""
        for name in self._redis.keys(f"{self._prefix}*"):
            left_s = self._redis.ttl(name)
            assert left_s > 0, "every key goes some day"
            self._redis.expire(name, left_s - seconds)


async def test_an_id_is_remembered_for_its_time_and_then_forgotten(
    redis_url: str, redis: "redis_client.Redis", open_table: OpenTable
) -> None:
    """At least ``ttl_s``, less than twice that; seeing it again does not prolong it."""
    settings = new_settings(redis_url, max_local_ids=1)
    table, pages = await open_table(settings), Pages(redis, settings)
    await table.sightings(["a", "b"], ["t:0:1", "t:0:2"])
    pages.age(TTL_S - 10)
    await table.sightings(["c"], ["t:0:3"])
    assert pages.ids() == [{"a", "b", "c"}]
    pages.age(20)
    assert await table.sightings(["a", "d"], ["t:0:4", "t:0:5"]) == ["t:0:1", "t:0:5"]
    assert await table.take_over("b", "t:0:2", "t:0:6") == "t:0:2|t:0:6"
    assert pages.ids() == [{"a", "b", "c"}, {"d"}]
    pages.age(TTL_S - 30)
    assert await table.sightings(["c", "b"], ["t:0:7"] * 2) == ["t:0:3", "t:0:2|t:0:6"]
    pages.age(40)
    assert await table.sightings(["a", "d"], ["t:0:8"] * 2) == ["t:0:8", "t:0:5"]
    assert pages.ids() == [{"d"}, {"a"}]


async def test_a_page_that_redis_gave_up_is_begun_anew(
    redis_url: str, redis: "redis_client.Redis", open_table: OpenTable
) -> None:
    """As under memory pressure: what the other page knows is still known."""
    settings = new_settings(redis_url, max_local_ids=1)
    table, pages = await open_table(settings), Pages(redis, settings)
    await table.sightings(["a"], ["t:0:1"])
    pages.age(TTL_S + 10)
    await table.sightings(["b", "c"], ["t:0:2"] * 2)
    redis.delete(redis.hget(f"{settings.key_prefix}pages", "newest"))
    assert await table.sightings(["a", "b"], ["t:0:3"] * 2) == ["t:0:1", "t:0:3"]
    assert pages.ids() == [{"a"}, {"b"}]


async def test_more_ids_than_may_be_are_forgotten_early_and_that_is_said(
    redis_url: str, redis: "redis_client.Redis", open_table: OpenTable
) -> None:
    settings = new_settings(redis_url, max_local_ids=1, max_ids=8)
    table, pages = await open_table(settings), Pages(redis, settings)

    async def see(ids: str) -> list[str]:
        return await table.sightings(list(ids), [f"first:{one}" for one in ids])

    with structlog.testing.capture_logs() as logs:
        await see("abcde")
        pages.age(100)
        await see("f")
        assert [one["event"] for one in logs] == ["first_seen_forgets_early"]
        assert logs[0]["remembered_s"] in (100, 101)
        assert logs[0]["wanted_s"] == TTL_S
    assert pages.ids() == [set("abcde"), set("f")]
    await see("ghij")
    await see("k")
    assert pages.ids() == [set("fghij"), set("k")]
    assert await table.sightings(["a", "j"], ["again"] * 2) == ["again", "first:j"]


async def test_the_first_of_an_id_twice_in_one_batch_is_what_others_see(
    redis_url: str, open_table: OpenTable
) -> None:
    settings = new_settings(redis_url)
    one, other = await open_table(settings), await open_table(settings)
    await one.sightings(["a", "b", "a"], ["t:0:1", "t:0:2", "t:0:3"])
    assert await other.sightings(["a"], ["t:1:1"]) == ["t:0:1"]


async def test_a_large_batch_is_asked_in_parts(redis_url: str, open_table: OpenTable) -> None:
    settings = new_settings(redis_url, max_local_ids=1)
    table = await open_table(settings)
    ids, sources = [str(one) for one in range(5_001)], [f"t:0:{one}" for one in range(5_001)]
    assert await table.sightings(ids, sources) == sources
    assert await table.sightings(ids, ["again"] * len(ids)) == sources


async def test_two_workers_share_what_they_saw(redis_url: str, open_table: OpenTable) -> None:
    settings = new_settings(redis_url)
    one, other = await open_table(settings), await open_table(settings)
    await one.sightings(["a"], ["t:0:1"])
    assert await other.sightings(["a", "b"], ["t:1:1", "t:1:2"]) == ["t:0:1", "t:1:2"]
    assert await one.sightings(["b"], ["t:0:2"]) == ["t:1:2"]


async def test_two_workers_at_once_agree(redis_url: str, open_table: OpenTable) -> None:
    """One of them is first for each id, whichever; never both, never none."""
    settings = new_settings(redis_url, max_local_ids=1000)
    tables = [await open_table(settings) for _ in range(2)]
    ids = [f"id-{number}" for number in range(200)]

    async def see(worker: int) -> list[str]:
        found: list[str] = []
        for start in range(0, len(ids), 20):
            some = ids[start : start + 20]
            found += await tables[worker].sightings(some, [f"t:{worker}:{one}" for one in some])
        return found

    first, second = await asyncio.gather(see(0), see(1))
    assert first == second
    assert {source.rpartition(":")[2] for source in first} == set(ids)


async def test_tables_of_two_prefixes_are_apart(redis_url: str, open_table: OpenTable) -> None:
    one, other = [await open_table(new_settings(redis_url)) for _ in range(2)]
    await one.sightings(["a"], ["t:0:1"])
    assert await other.sightings(["a"], ["t:1:1"]) == ["t:1:1"]


async def test_known_ids_cost_redis_nothing(redis_url: str, open_table: OpenTable) -> None:
    table = await open_table(new_settings(redis_url))
    await table.sightings(["a", "b"], ["t:0:1", "t:0:2"])
    await table.sightings(["a", "b", "c"], ["t:0:1", "t:0:2", "t:0:3"])
    assert table.statistics().redis_lookups_total == 3


async def test_redis_that_is_down_at_the_start_is_a_config_error() -> None:
    (port,) = free_ports(1)
    with pytest.raises(ConfigError) as refused:
        await open_first_seen(RedisSettings(url=f"redis://127.0.0.1:{port}/0"))
    assert f"no Redis answers at redis://127.0.0.1:{port}/0" in str(refused.value)
    assert "tapeline up" in str(refused.value)


async def test_a_shard_that_is_down_at_the_start_is_a_config_error(redis_url: str) -> None:
    (port,) = free_ports(1)
    settings = new_settings(redis_url, more_urls=[f"redis://127.0.0.1:{port}/0"])
    with pytest.raises(ConfigError, match=f"no Redis answers at redis://127.0.0.1:{port}/0"):
        await open_first_seen(settings)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"url": "", "more_urls": ["redis://b:6379/0"]}, "url is empty"),
        ({"url": "redis://a:6379/0", "more_urls": ["redis://a:6379/0"]}, "twice"),
        ({"more_urls": ["redis://b:6379/0"] * 2}, "twice"),
    ],
)
def test_shards_that_cannot_be_are_refused(changes: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        load_settings(redis=changes)


@pytest.fixture
def own_stack(tmp_path: Path) -> Iterator[Stack]:
    """A Redis that a test may stop, on a free port; not started."""
    stack = Stack.on_free_ports(load_settings(state_dir=tmp_path / "state"))
    try:
        yield stack
    finally:
        stack.down(purge=True)


async def test_two_workers_look_for_an_id_in_the_same_shard(
    redis_url: str, redis: "redis_client.Redis", open_table: OpenTable
) -> None:
    """Each id lies in one of them, and both have some."""
    other_url = second_database(redis_url)
    settings = new_settings(redis_url, more_urls=[other_url])
    one, other = await open_table(settings), await open_table(settings)
    ids = [f"id-{number}" for number in range(100)]
    sources = [f"t:0:{number}" for number in range(100)]
    assert await one.sightings(ids, sources) == sources
    assert await other.sightings(ids[::-1], ["t:1:1"] * 100) == sources[::-1]
    assert await other.take_over("id-7", "t:0:7", "t:1:2") == "t:0:7|t:1:2"
    assert await one.take_over("id-7", "t:1:2", "t:1:3") == "t:0:7|t:1:2|t:1:3"
    with redis_client.Redis.from_url(other_url) as second:
        shares = [Pages(each, settings).ids() for each in (redis, second)]
    in_the_second = {one for one in ids if zlib.crc32(one.encode()) % 2}  # in any process
    assert shares == [[set(ids) - in_the_second], [in_the_second]]
    assert 25 < len(in_the_second) < 75


async def test_a_shard_that_dies_leaves_the_others_at_work(
    redis_url: str, own_stack: Stack, open_table: OpenTable
) -> None:
    """Of its ids each worker goes on with what it knows by itself."""
    url = own_stack.start("redis").endpoint
    settings = new_settings(redis_url, more_urls=[url], max_local_ids=1000)
    one, other = await open_table(settings), await open_table(settings)
    ids, sources = list(map(str, range(100))), [f"t:0:{number}" for number in range(100)]
    own_stack.stop("redis")
    assert await one.sightings(ids, sources) == sources
    assert await one.sightings(ids, ["again"] * 100) == sources
    seen_here = await other.sightings(ids, ["t:1:1"] * 100)
    assert 25 < seen_here.count("t:1:1") < 75
    assert one.statistics().degraded
    assert other.statistics().degraded


async def asked_until_restored(table: RedisFirstSeen) -> int:
    """Shows it ``after-1``, ``after-2`` ... at ``t:1:1``, ``t:1:2`` ...; the last one's number."""
    number = 0
    async with asyncio.timeout(LONG_S):
        while table.statistics().degraded:
            number += 1
            source = f"t:1:{number}"
            assert await table.sightings([f"after-{number}"], [source]) == [source]
            await asyncio.sleep(0.02)
    return number


async def test_redis_that_dies_degrades_and_comes_back(
    own_stack: Stack, open_table: OpenTable
) -> None:
    """Nothing is lost, own duplicates are still told, and the shared table is used again."""
    url = own_stack.start("redis").endpoint
    settings = new_settings(url, max_local_ids=1000)
    table = await open_table(settings)
    await table.sightings(["before"], ["t:0:1"])
    own_stack.stop("redis")

    answer = await table.sightings(["before", "during", "during"], ["t:0:2", "t:0:3", "t:0:4"])
    assert answer == ["t:0:1", "t:0:3", "t:0:3"]
    assert table.statistics().degraded
    assert table.statistics().redis_failures_total == 1
    # Until it is time to ask again, Redis costs nothing.
    assert await table.sightings(["during"], ["t:0:5"]) == ["t:0:3"]

    assert own_stack.start("redis").endpoint == url
    number = await asked_until_restored(table)
    other = await open_table(settings)
    assert await other.sightings([f"after-{number}"], ["t:2:0"]) == [f"t:1:{number}"]


async def test_redis_that_hangs_costs_one_timeout_and_answers_no_other_question(
    own_stack: Stack, open_table: OpenTable
) -> None:
    """What it says once it goes on was asked by somebody who has gone."""
    status = own_stack.start("redis")
    assert status.pid
    settings = new_settings(status.endpoint, timeout_ms=300)
    table = await open_table(settings)
    await table.sightings(["before"], ["t:0:1"])
    os.kill(status.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(LONG_S):
            answer = await table.sightings(["a", "b"], ["t:0:2", "t:0:3"])
        assert answer == ["t:0:2", "t:0:3"]
        assert table.statistics().degraded
        assert table.statistics().redis_failures_total == 1
    finally:
        os.kill(status.pid, signal.SIGCONT)
    number = await asked_until_restored(table)
    other = await open_table(settings)
    asked = [f"after-{number}", "new"]
    assert await other.sightings(asked, ["t:2:0", "t:2:1"]) == [f"t:1:{number}", "t:2:1"]
