"""What MarketEventProducer promises, on a real broker."""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka import Message as KafkaMessage
from confluent_kafka.admin import AdminClient

from schemas.codec import Codec
from schemas.errors import ConfigError, TransientError
from schemas.messages import Book, InvalidEvent, MarketEvent, Trade
from schemas.settings import Settings
from tapeline import AsyncMarketEventProducer, Delivery, DeliveryFailed, MarketEventProducer
from tapeline.topics import ensure_topics
from tests.waiting import wait_until

MakeSettings = Callable[..., Settings]
NUM_PARTITIONS = 7

# Kafka's own test vectors of the Java client's murmur2 (UtilsTest.testMurmur2).
JAVA_MURMUR2 = {
    "21": -973932308,
    "foobar": -790332482,
    "a-little-bit-long-string": -985981536,
    "a-little-bit-longer-string": -1486304829,
    "lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    "abc": 479470107,
}


@pytest.fixture
def lane_settings(make_settings: MakeSettings) -> Settings:
    """Settings whose topics exist, 7 partitions each."""
    settings = make_settings(kafka={"num_partitions": NUM_PARTITIONS})
    ensure_topics(settings)
    return settings


def make_event(number: int, symbol: str = "BTCUSDT", price: float = 1.0) -> MarketEvent:
    return MarketEvent(
        f"{symbol}-{number}", symbol, "TEST", 1_700_000_000_000_000 + number, Trade(price, 2.0)
    )


def read_topic(settings: Settings, topic: str, num_messages: int) -> list[KafkaMessage]:
    """The first so many messages of a topic, whatever their order among partitions."""
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": uuid.uuid4().hex,
            "enable.auto.commit": False,
        }
    )
    try:
        consumer.assign([TopicPartition(topic, number, 0) for number in range(NUM_PARTITIONS)])
        messages: list[KafkaMessage] = consumer.consume(num_messages, 20)
        assert [message.error() for message in messages] == [None] * num_messages
        return messages
    finally:
        consumer.close()


def delete_topic(settings: Settings, topic: str) -> None:
    admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers})
    admin.delete_topics([topic])[topic].result(10)


def test_a_symbol_lives_where_the_java_client_puts_it(lane_settings: Settings) -> None:
    deliveries: dict[str, Delivery] = {}
    with MarketEventProducer(lane_settings) as producer:
        for symbol in JAVA_MURMUR2:
            producer.produce(
                make_event(1, symbol),
                on_delivery=lambda delivery, symbol=symbol: deliveries.update({symbol: delivery}),
            )
    assert {symbol: one.partition for symbol, one in deliveries.items()} == {
        symbol: (murmur2 & 0x7FFFFFFF) % NUM_PARTITIONS for symbol, murmur2 in JAVA_MURMUR2.items()
    }


def test_an_event_arrives_whole_in_its_lane_with_its_headers(lane_settings: Settings) -> None:
    event = MarketEvent("e1", "ETHUSDT", "TEST", 1_700_000_000_000_000, Book(b"", b""), 7)
    with MarketEventProducer(lane_settings) as producer:
        producer.produce(event, lane="batch", headers=[("traceparent", b"00-ab-cd-01")])
    [message] = read_topic(lane_settings, lane_settings.lane("batch").topic, 1)
    headers: Any = message.headers()
    assert message.key() == b"ETHUSDT"
    assert ("traceparent", b"00-ab-cd-01") in headers
    assert Codec(lane_settings.schema_registry).decode_event(message.value(), headers) == event


def test_events_of_a_symbol_keep_their_order_and_all_are_counted(lane_settings: Settings) -> None:
    with MarketEventProducer(lane_settings) as producer:
        for number in range(2000):
            producer.produce(make_event(number))
        producer.flush()
        statistics = producer.statistics()
    assert (statistics.num_produced, statistics.num_acknowledged) == (2000, 2000)
    assert (statistics.num_failed, statistics.num_in_flight) == (0, 0)
    codec = Codec(lane_settings.schema_registry)
    messages = read_topic(lane_settings, lane_settings.lane("realtime").topic, 2000)
    events = [codec.decode_event(one.value(), one.headers() or ()) for one in messages]  # type: ignore[arg-type]
    assert [event.event_id for event in events] == [f"BTCUSDT-{n}" for n in range(2000)]


def test_a_full_buffer_holds_the_producer_back_and_loses_nothing(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings(kafka={"client": {"queue.buffering.max.messages": 10}})
    ensure_topics(settings)
    with MarketEventProducer(settings) as producer:
        for number in range(500):
            producer.produce(make_event(number))
            assert producer.statistics().num_in_flight <= 10
        producer.flush()
        assert producer.statistics().num_acknowledged == 500


def test_a_bad_event_is_refused_before_anything_is_sent(lane_settings: Settings) -> None:
    with MarketEventProducer(lane_settings) as producer:
        with pytest.raises(InvalidEvent, match="price must be"):
            producer.produce(make_event(1, price=-1))
        assert producer.statistics().num_produced == 0


def test_a_missing_topic_names_the_command_that_makes_it(make_settings: MakeSettings) -> None:
    settings = make_settings()
    with (
        MarketEventProducer(settings) as producer,
        pytest.raises(ConfigError, match="tapeline topics --create"),
    ):
        producer.produce(make_event(1))


def test_a_failed_delivery_surfaces_once_at_the_next_call(lane_settings: Settings) -> None:
    with MarketEventProducer(lane_settings, delivery_timeout_s=2) as producer:

        def produce_one() -> DeliveryFailed | None:
            producer.produce(make_event(1))
            try:
                producer.flush()
            except DeliveryFailed as failure:
                return failure
            return None

        assert produce_one() is None
        delete_topic(lane_settings, lane_settings.lane("realtime").topic)
        # The broker takes events until it has really let go of the topic.
        failure = wait_until(produce_one, 30, "a delivery into a deleted topic to fail")
        assert failure is not None
        assert failure.num_events == 1
        # A topic that went away is the user's to mend; a timeout may pass by itself.
        assert isinstance(failure, ConfigError | TransientError)
        producer.flush()  # told once, not again
        assert producer.statistics().num_failed == 1


def test_a_record_too_large_is_refused_for_good(make_settings: MakeSettings) -> None:
    settings = make_settings(kafka={"client": {"message.max.bytes": 1000}})
    ensure_topics(settings)
    with MarketEventProducer(settings) as producer:
        with pytest.raises(DeliveryFailed, match="1 event not delivered") as failure:
            producer.produce(make_event(1), headers=[("large", b"x" * 2000)])
        assert isinstance(failure.value, ConfigError)


@pytest.mark.parametrize(
    "contradiction",
    [{"acks": "1"}, {"enable.idempotence": False}, {"partitioner": "consistent"}],
    ids=lambda one: next(iter(one)),
)
def test_what_delivery_depends_on_cannot_be_switched_off(
    make_settings: MakeSettings, contradiction: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"kafka.client: {next(iter(contradiction))}"):
        MarketEventProducer(make_settings(kafka={"client": contradiction}))


def test_idempotence_reaches_librdkafka(make_settings: MakeSettings) -> None:
    """librdkafka itself refuses what only an idempotent producer may not have."""
    with pytest.raises(ConfigError, match="idempotence"):
        MarketEventProducer(make_settings(kafka={"client": {"max.in.flight": 6}}))


async def test_send_returns_where_the_event_went(lane_settings: Settings) -> None:
    async with AsyncMarketEventProducer(lane_settings) as producer:
        first = await producer.send(make_event(1))
        second = await producer.send(make_event(2))
    assert first.topic == lane_settings.lane("realtime").topic
    assert (second.partition, second.offset) == (first.partition, first.offset + 1)
    assert second.appended_us >= first.appended_us > 1_700_000_000_000_000


async def test_sends_at_once_keep_their_order(lane_settings: Settings) -> None:
    async with AsyncMarketEventProducer(lane_settings, max_in_flight=50) as producer:
        async with asyncio.TaskGroup() as group:
            sends = [group.create_task(producer.send(make_event(n))) for n in range(500)]
        assert producer.statistics().num_acknowledged == 500
    assert [send.result().offset for send in sends] == list(range(500))


async def test_a_cancelled_send_leaves_the_producer_sound(lane_settings: Settings) -> None:
    async with AsyncMarketEventProducer(lane_settings) as producer:
        await producer.send(make_event(0))
        send = asyncio.create_task(producer.send(make_event(1)))
        await asyncio.sleep(0)  # it has put its event and waits for the answer
        send.cancel()
        with pytest.raises(asyncio.CancelledError):
            await send
        await producer.send(make_event(2))
    assert producer.statistics().num_acknowledged == 3


async def test_send_raises_what_is_wrong(make_settings: MakeSettings) -> None:
    settings = make_settings()
    async with AsyncMarketEventProducer(settings) as producer:
        with pytest.raises(ConfigError, match="tapeline topics --create"):
            await producer.send(make_event(1))
        ensure_topics(settings)
        with pytest.raises(InvalidEvent):
            await producer.send(make_event(1, price=float("nan")))
        await producer.send(make_event(1))


async def test_send_raises_a_refused_delivery(make_settings: MakeSettings) -> None:
    settings = make_settings(kafka={"client": {"message.max.bytes": 1000}})
    ensure_topics(settings)
    async with AsyncMarketEventProducer(settings) as producer:
        with pytest.raises(DeliveryFailed):
            await producer.send(make_event(1), headers=[("large", b"x" * 2000)])
