"""What FeatureSubscriber promises, on a real broker."""

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
from confluent_kafka import Producer

from schemas.codec import Codec
from schemas.errors import ConfigError, PoisonRecord
from schemas.messages import FeatureVector, Flags
from schemas.settings import Settings
from tapeline import FeatureSubscriber
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
IDLE_S = 2.0
LONG_S = 20.0


@pytest.fixture
def lane_settings(settings: Settings) -> Settings:
    """Settings whose topics exist."""
    ensure_topics(settings)
    return settings


def make_feature(number: int, symbol: str = "AAA", venue: str = "V") -> FeatureVector:
    return FeatureVector(
        event_id=f"{symbol}-{number}",
        symbol=symbol,
        venue=venue,
        event_time_us=1_700_000_000_000_000 + number,
        lane="realtime",
        model_version="m1",
        channels_version="market50-v1",
        source_topic="market-events.realtime",
        source_partition=0,
        source_offset=number,
        features=np.arange(64, dtype=np.float32) + number,
        scores={"up": 0.25},
        flags=Flags.STALE,
    )


class Publisher:
    """Writes features as a worker does."""

    def __init__(self, settings: Settings, *, transactional: bool = False) -> None:
        self.topic = settings.lane("realtime").output_topic
        self._codec = Codec(settings.schema_registry)
        config: dict[str, str] = {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "partitioner": "murmur2_random",
            "enable.idempotence": "true",  # else a retry overtakes what was sent after it
        }
        if transactional:
            config["transactional.id"] = uuid.uuid4().hex
        self.producer = Producer(config)

    def publish(self, features: Iterable[FeatureVector]) -> None:
        for feature in features:
            value = self._codec.encode_feature(feature)
            self.producer.produce(self.topic, value, feature.symbol.encode())
        assert self.producer.flush(LONG_S) == 0

    def publish_raw(self, value: bytes) -> None:
        self.producer.produce(self.topic, value, b"AAA")
        assert self.producer.flush(LONG_S) == 0


def subscribe(settings: Settings, **options: object) -> FeatureSubscriber:
    arguments = {"lanes": ["realtime"], "start": "earliest", "idle_timeout_s": IDLE_S, **options}
    return FeatureSubscriber(settings, **arguments)  # type: ignore[arg-type]


def test_a_feature_comes_out_as_it_went_in(lane_settings: Settings) -> None:
    sent = replace(make_feature(7), source_appended_us=1_700_000_000_000_000)
    Publisher(lane_settings).publish([sent])
    with subscribe(lane_settings, limit=1, idle_timeout_s=LONG_S) as subscriber:
        [record] = subscriber.records()
    got = record.feature
    np.testing.assert_array_equal(got.features, sent.features)
    assert (got.event_id, got.symbol, got.venue) == (sent.event_id, sent.symbol, sent.venue)
    assert (got.scores, got.flags, got.source_offset) == ({"up": 0.25}, Flags.STALE, 7)
    assert (record.topic, record.offset) == (lane_settings.lane("realtime").output_topic, 0)
    assert record.source_appended_us == 1_700_000_000_000_000
    assert record.latency_us == record.appended_us - record.source_appended_us > 0


def test_a_feature_without_its_source_time_has_no_latency(lane_settings: Settings) -> None:
    Publisher(lane_settings).publish([make_feature(1)])
    with subscribe(lane_settings, limit=1, idle_timeout_s=LONG_S) as subscriber:
        [record] = subscriber.records()
    assert (record.source_appended_us, record.latency_us) == (None, None)


def test_latest_begins_where_it_was_opened(lane_settings: Settings) -> None:
    publisher = Publisher(lane_settings)
    publisher.publish([make_feature(1)])
    with subscribe(lane_settings, start="latest", limit=1, idle_timeout_s=LONG_S) as subscriber:
        publisher.publish([make_feature(2)])  # before the first poll, yet after open
        assert [feature.source_offset for feature in subscriber] == [2]


def test_each_symbol_comes_once_and_in_order(lane_settings: Settings) -> None:
    symbols = [f"S{number}" for number in range(9)]
    Publisher(lane_settings).publish(make_feature(n, symbols[n % 9]) for n in range(900))
    with subscribe(lane_settings, limit=900, idle_timeout_s=LONG_S) as subscriber:
        features = list(subscriber)
    for index, symbol in enumerate(symbols):
        offsets = [one.source_offset for one in features if one.symbol == symbol]
        assert offsets == list(range(index, 900, 9))


def test_aborted_transactions_are_never_seen(lane_settings: Settings) -> None:
    publisher = Publisher(lane_settings, transactional=True)
    publisher.producer.init_transactions(LONG_S)
    publisher.producer.begin_transaction()
    publisher.publish([make_feature(1)])
    publisher.producer.abort_transaction(LONG_S)
    publisher.producer.begin_transaction()
    publisher.publish([make_feature(2)])
    with subscribe(lane_settings) as subscriber:
        assert list(subscriber) == []  # not committed yet
        publisher.producer.commit_transaction(LONG_S)
    with subscribe(lane_settings, limit=1, idle_timeout_s=LONG_S) as subscriber:
        assert [feature.source_offset for feature in subscriber] == [2]


def test_isolation_cannot_be_switched_off(make_settings: MakeSettings) -> None:
    settings = make_settings(kafka={"client": {"isolation.level": "read_uncommitted"}})
    ensure_topics(settings)
    with pytest.raises(ConfigError, match=r"isolation\.level"):
        subscribe(settings).open()


def test_symbols_and_venues_choose(lane_settings: Settings) -> None:
    Publisher(lane_settings).publish(
        make_feature(number, symbol, venue)
        for number, (symbol, venue) in enumerate([("A", "V"), ("B", "V"), ("A", "W"), ("B", "W")])
    )
    with subscribe(lane_settings, symbols=["A"], venues=["W"]) as subscriber:
        assert [feature.source_offset for feature in subscriber] == [2]
        assert subscriber.statistics().num_filtered == 3


def test_a_record_that_is_no_feature_is_raised_and_passed(lane_settings: Settings) -> None:
    publisher = Publisher(lane_settings)
    publisher.publish([make_feature(1)])
    publisher.publish_raw(b"junk")
    publisher.publish([make_feature(2)])
    with subscribe(lane_settings, limit=2, idle_timeout_s=LONG_S) as subscriber:
        assert next(subscriber).source_offset == 1
        with pytest.raises(PoisonRecord, match="at offset 1 is no feature"):
            next(subscriber)
        assert [feature.source_offset for feature in subscriber] == [2]
    options = {"undecodable": "skip", "limit": 2, "idle_timeout_s": LONG_S}
    with subscribe(lane_settings, **options) as subscriber:
        assert [feature.source_offset for feature in subscriber] == [1, 2]
        assert subscriber.statistics().num_undecodable == 1


def test_a_group_goes_on_where_it_stopped(lane_settings: Settings) -> None:
    Publisher(lane_settings).publish(make_feature(number) for number in range(10))
    group = uuid.uuid4().hex
    with subscribe(lane_settings, group=group, limit=4, idle_timeout_s=LONG_S) as subscriber:
        assert [feature.source_offset for feature in subscriber] == [0, 1, 2, 3]
    options = {"group": group, "start": "committed", "limit": 6, "idle_timeout_s": LONG_S}
    with subscribe(lane_settings, **options) as subscriber:
        assert [feature.source_offset for feature in subscriber] == [4, 5, 6, 7, 8, 9]


def test_a_group_gets_an_unfinished_feature_again(lane_settings: Settings) -> None:
    Publisher(lane_settings).publish(make_feature(number) for number in range(4))
    options = {"group": uuid.uuid4().hex, "limit": 4, "idle_timeout_s": LONG_S}
    subscriber = subscribe(lane_settings, **options)

    def fail_at_the_third() -> None:
        with subscriber:
            for feature in subscriber:
                if feature.source_offset == 2:
                    raise RuntimeError("the user's code fails")

    with pytest.raises(RuntimeError, match="the user's code"):
        fail_at_the_third()
    with subscribe(lane_settings, **{**options, "limit": 2}) as again:
        assert [feature.source_offset for feature in again] == [2, 3]


@pytest.mark.parametrize("group", [None, "nobody-was-here"])
def test_committed_needs_a_group_that_has_committed(
    lane_settings: Settings, group: str | None
) -> None:
    with pytest.raises(ConfigError, match="start"):
        subscribe(lane_settings, start="committed", group=group).open()


def test_a_missing_topic_names_the_command_that_makes_it(make_settings: MakeSettings) -> None:
    with pytest.raises(ConfigError, match="tapeline topics --create"):
        subscribe(make_settings()).open()


def test_close_from_another_thread_ends_the_iteration(lane_settings: Settings) -> None:
    subscriber = subscribe(lane_settings, idle_timeout_s=None)
    subscriber.open()
    features: list[FeatureVector] = []
    reader = threading.Thread(target=lambda: features.extend(subscriber))
    reader.start()
    subscriber.close()
    reader.join(LONG_S)
    assert not reader.is_alive()
    assert list(subscriber) == []  # and it stays ended


async def test_async_iteration_gives_the_same(lane_settings: Settings) -> None:
    Publisher(lane_settings).publish(make_feature(number) for number in range(600))
    async with subscribe(lane_settings, limit=600, idle_timeout_s=LONG_S) as subscriber:
        offsets = [record.feature.source_offset async for record in subscriber.records()]
    assert offsets == list(range(600))


async def test_async_iteration_ends_on_close(lane_settings: Settings) -> None:
    async with subscribe(lane_settings, idle_timeout_s=None) as subscriber:
        waiting = asyncio.ensure_future(anext(subscriber, None))
        await asyncio.sleep(0)
        await asyncio.to_thread(subscriber.close)
        assert await asyncio.wait_for(waiting, LONG_S) is None


async def test_a_cancelled_wait_loses_nothing(lane_settings: Settings) -> None:
    publisher = Publisher(lane_settings)
    async with subscribe(lane_settings, idle_timeout_s=LONG_S, limit=3) as subscriber:
        waiting = asyncio.ensure_future(anext(subscriber))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(waiting, 0.05)
        await asyncio.to_thread(publisher.publish, [make_feature(n) for n in range(3)])
        assert [feature.source_offset async for feature in subscriber] == [0, 1, 2]
