"""Records that Kafka's client calls delivered, at no offset: some of them the broker does not have.

Before Kafka 4.5 a broker takes a new producer's second request to a partition though it has refused
the first (KAFKA-15591). That must be noticed, whoever produces.
"""

import asyncio
from collections.abc import Callable

import pytest
from late_leader import late_leader, unsure_leader
from pipeline import (
    RunningWorker,
    assert_once_and_in_order,
    features,
    local,
    produce,
    running_worker,
)

from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.codec import Codec
from schemas.errors import TransientError
from schemas.messages import MarketEvent, Trade
from schemas.settings import Settings
from tapeline import AsyncMarketEventProducer, Delivery, DeliveryFailed, MarketEventProducer
from tapeline.reading import read_spans, spans_between
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
LANE = "realtime"
NUM_EVENTS = 100


@pytest.fixture(scope="module")
def small_engine() -> Engine:
    config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1)
    return Engine(seeded_artifact(config=config), device="cpu", max_batch=256)


@pytest.fixture
def lane_settings(make_settings: MakeSettings) -> Settings:
    """One partition, whose topics exist."""
    settings = make_settings(kafka={"num_partitions": 1})
    ensure_topics(settings)
    return settings


def events() -> list[MarketEvent]:
    return [
        MarketEvent(str(number), "BTCUSDT", "TEST", 1_700_000_000_000_000 + number, Trade(1.0, 2.0))
        for number in range(NUM_EVENTS)
    ]


def ids(settings: Settings) -> set[str]:
    """Of the events that the lane's topic has."""
    topic = settings.lane(LANE).topic
    spans = spans_between(settings, [topic])
    codec = Codec(settings.schema_registry)
    found = read_spans(settings, spans)
    return {codec.decode_event(one.value(), one.headers() or ()).event_id for one in found}


def test_a_producer_says_which_events_it_lost(lane_settings: Settings) -> None:
    sent = events()
    acknowledged: list[int] = []
    with late_leader(lane_settings.kafka.bootstrap_servers, lane_settings.lane(LANE).topic) as late:
        producer = MarketEventProducer(late.through(lane_settings))
        for event in sent:
            producer.produce(event, on_delivery=lambda one: acknowledged.append(one.offset))
        with pytest.raises(DeliveryFailed, match="perhaps not this one") as failure:
            producer.close()
    assert late.num_refused == 1
    kept = ids(lane_settings)
    assert 0 < failure.value.num_events == len(sent) - len(kept)
    assert producer.statistics().num_failed == failure.value.num_events
    assert acknowledged == list(range(len(kept)))


async def test_an_asynchronous_producer_says_which_events_it_lost(lane_settings: Settings) -> None:
    sent = events()
    with late_leader(lane_settings.kafka.bootstrap_servers, lane_settings.lane(LANE).topic) as late:
        async with AsyncMarketEventProducer(late.through(lane_settings)) as producer:
            answers = await asyncio.gather(*map(producer.send, sent), return_exceptions=True)
    lost = {
        event.event_id
        for event, answer in zip(sent, answers, strict=True)
        if isinstance(answer, DeliveryFailed)
    }
    assert late.num_refused == 1
    assert lost
    assert ids(lane_settings) == {event.event_id for event in sent} - lost


def test_a_producer_delivers_what_it_sent_twice(lane_settings: Settings) -> None:
    sent = events()
    delivered: list[Delivery] = []
    topic = lane_settings.lane(LANE).topic
    with unsure_leader(lane_settings.kafka.bootstrap_servers, topic) as unsure:
        with MarketEventProducer(unsure.through(lane_settings)) as producer:
            producer.produce(sent[0], on_delivery=delivered.append)
            producer.flush()
            for event in sent[1:]:
                producer.produce(event, on_delivery=delivered.append)
        assert producer.statistics().num_acknowledged == len(sent)
    assert unsure.num_unsure == 1
    assert_delivered(lane_settings, sent, delivered)


async def test_an_asynchronous_producer_delivers_what_it_sent_twice(
    lane_settings: Settings,
) -> None:
    sent = events()
    topic = lane_settings.lane(LANE).topic
    with unsure_leader(lane_settings.kafka.bootstrap_servers, topic) as unsure:
        async with AsyncMarketEventProducer(unsure.through(lane_settings)) as producer:
            first = await producer.send(sent[0])
            others = await asyncio.gather(*map(producer.send, sent[1:]))
    assert unsure.num_unsure == 1
    assert_delivered(lane_settings, sent, [first, *others])


def assert_delivered(
    settings: Settings, sent: list[MarketEvent], delivered: list[Delivery]
) -> None:
    """Each once, some of them at a place that nobody knows."""
    topic = settings.lane(LANE).topic
    assert spans_between(settings, [topic])[topic, 0].end == len(sent)
    assert ids(settings) == {event.event_id for event in sent}
    known = {one.offset for one in delivered if one.offset is not None}
    assert len(known) < len(delivered) == len(sent)
    assert known < set(range(len(sent)))
    assert all((one.offset is None) == (one.appended_us is None) for one in delivered)


def test_at_least_once_ends_and_does_them_again(
    lane_settings: Settings, small_engine: Engine
) -> None:
    produce(lane_settings, events(), LANE)
    with late_leader(
        lane_settings.kafka.bootstrap_servers, lane_settings.lane(LANE).output_topic
    ) as late:
        first = RunningWorker(late.through(lane_settings), local(small_engine))
        try:
            with pytest.raises(TransientError, match="perhaps not this one"):
                first.join()
        finally:
            if first.is_alive:
                first.stop()
    assert late.num_refused == 1
    with running_worker(lane_settings, small_engine) as second:
        second.wait_until_ended(LANE, NUM_EVENTS)
    got = {record.feature.event_id for record in features(lane_settings)}
    assert got == {event.event_id for event in events()[59:]}


def test_exactly_once_aborts_and_does_them_again(
    lane_settings: Settings, small_engine: Engine
) -> None:
    produce(lane_settings, events(), LANE)
    owed = events()[59:]
    worker_settings = lane_settings.worker.model_copy(update={"delivery": "exactly_once"})
    exactly_once = lane_settings.model_copy(update={"worker": worker_settings})
    with (
        late_leader(
            lane_settings.kafka.bootstrap_servers, lane_settings.lane(LANE).output_topic
        ) as late,
        running_worker(late.through(exactly_once), small_engine) as worker,
    ):
        received = features(lane_settings, len(owed))
        assert worker.statistics().transactions[LANE].aborted_total == 1
    assert late.num_refused == 1
    assert_once_and_in_order(received)
    assert {record.feature.event_id for record in received} == {one.event_id for one in owed}


def test_topics_are_there_once_their_leaders_answer(lane_settings: Settings) -> None:
    topic = lane_settings.lane(LANE).dlq_topic
    with late_leader(lane_settings.kafka.bootstrap_servers, topic, "list_offsets") as late:
        ensure_topics(late.through(lane_settings))
    assert late.num_refused == 1
