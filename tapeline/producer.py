"""Market events in: the producing half of the client library, sync and asyncio.

Both are idempotent and wait for all in-sync replicas; the key is the symbol, and the partitioner is
the Java client's, so that every client of a lane agrees on where a symbol lives.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from schemas.codec import Codec
from schemas.errors import ConfigError, TapelineError, TransientError
from schemas.kafka import IDEMPOTENT, Deliveries, client_config, make_client
from schemas.messages import Headers, MarketEvent
from schemas.settings import Settings
from tapeline.clients import check_kafka, missing_topic, settings_or_load

DEFAULT_LANE = "realtime"
_STEP_S = 0.1  # of a wait in librdkafka: how long a signal or a close may have to wait
_UNKNOWN_TOPIC = frozenset(
    (
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    )
)
_REFUSED = frozenset(
    (
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.POLICY_VIOLATION,
        KafkaError._AUTHENTICATION,
    )
)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The acknowledgement of one event by all in-sync replicas.

    Attributes:
        offset, appended_us: its place, and the broker's clock at the append (Unix epoch; Kafka
            keeps milliseconds). None, both: the event is there, but the answer that said where got
            lost with a broker.
    """

    topic: str
    partition: int
    offset: int | None
    appended_us: int | None


@dataclass(frozen=True, slots=True)
class ProducerStatistics:
    """Events so far: produced = acknowledged + failed + in flight, always."""

    num_produced: int
    num_acknowledged: int
    num_failed: int

    @property
    def num_in_flight(self) -> int:
        return self.num_produced - self.num_acknowledged - self.num_failed


class DeliveryFailed(TapelineError):
    """Events were not acknowledged. Always also a TransientError or a ConfigError.

    Attributes:
        num_events: how many, since this was last raised.
    """

    def __init__(self, message: str, num_events: int = 1) -> None:
        super().__init__(message)
        self.num_events = num_events


class DeliveryTimedOut(DeliveryFailed, TransientError):
    """The broker did not acknowledge in time; producing again may work, and may repeat events."""


class DeliveryRefused(DeliveryFailed, ConfigError):
    """The broker will never take these events as things are: no such topic, no right, too large."""


DeliveryCallback = Callable[[KafkaError | None, Message], None]


class _Outgoing(NamedTuple):
    topic: str
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes | None]]


class _Connection:
    """A librdkafka producer, the codec, and the topics known to exist."""

    def __init__(self, settings: Settings, delivery_timeout_s: float) -> None:
        self.settings = settings
        self.codec = Codec(settings.schema_registry)
        self.topics: dict[str, str] = {}  # of the lanes that were looked up
        self.producer = make_client(
            Producer,
            client_config(
                settings,
                defaults={
                    "client.id": "tapeline-producer",
                    "linger.ms": 1,
                    "compression.type": "lz4",  # a fifth of the bytes; docs/performance.md
                    "delivery.timeout.ms": int(delivery_timeout_s * 1000),
                },
                required=IDEMPOTENT,
            ),
        )

    def look_up(self, lane: str) -> str:
        """The topic of a lane, which exists. Blocks; raises ConfigError."""
        topic = self.settings.lane(lane).topic
        check_kafka(self.settings, [topic])
        self.topics[lane] = topic
        return topic

    def encode(self, event: MarketEvent, topic: str, headers: Headers) -> _Outgoing:
        """Raises InvalidEvent."""
        return _Outgoing(topic, event.symbol.encode(), self.codec.encode_event(event), [*headers])

    def try_put(self, message: _Outgoing, on_delivery: DeliveryCallback) -> bool:
        """Puts it into librdkafka's queue; False while that is full. Raises DeliveryFailed."""
        topic, key, value, headers = message
        try:
            if headers:
                self.producer.produce(topic, value, key, headers=headers, on_delivery=on_delivery)
            else:
                self.producer.produce(topic, value, key, on_delivery=on_delivery)
        except BufferError:
            return False
        except KafkaException as error:
            raise self.failure(error.args[0], topic) from error
        return True

    def failure(self, error: KafkaError, topic: str, num_events: int = 1) -> DeliveryFailed:
        """The error to raise for what librdkafka says about events of a topic."""
        events = "1 event" if num_events == 1 else f"{num_events} events"
        if error.code() in _UNKNOWN_TOPIC:
            cause = missing_topic(topic, settings=self.settings)
            return DeliveryRefused(f"{events} lost: {cause}", num_events)
        text = f"{events} not delivered to {topic}: {error.str()}"
        if error.code() in _REFUSED:
            mend = "check the rights and limits of the topic"
            return DeliveryRefused(f"{text}; {mend}", num_events)
        return DeliveryTimedOut(text, num_events)


class MarketEventProducer:
    """Produces market events from one thread; buffers, and sends in the background.

    A delivery that fails is raised as DeliveryFailed by the next ``produce``, ``flush`` or
    ``close``, once. Events of one symbol arrive in the order in which they are produced.

    >>> with MarketEventProducer() as producer:
    ...     producer.produce(event, lane="realtime")

    Args:
        delivery_timeout_s: an event that is not acknowledged for so long has failed.
        overrides: sections of the settings, when ``settings`` is not given:
            ``kafka={"bootstrap_servers": "broker:9092"}``.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        delivery_timeout_s: float = 30,
        **overrides: Any,
    ) -> None:
        self._connection = _Connection(settings_or_load(settings, overrides), delivery_timeout_s)
        self._producer: Producer = self._connection.producer
        self._deliveries = Deliveries()
        self._delivery_timeout_s = delivery_timeout_s
        self._num_produced = self._num_acknowledged = self._num_failed = 0
        self._failure: tuple[KafkaError, str] | None = None
        self._num_unraised = 0
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close(timeout_s=None if kind is None else 1)
        except DeliveryFailed:
            if kind is None:
                raise

    def produce(
        self,
        event: MarketEvent,
        *,
        lane: str = DEFAULT_LANE,
        headers: Headers = (),
        on_delivery: Callable[[Delivery], None] | None = None,
    ) -> None:
        """Puts one event into the buffer. Blocks while the buffer is full.

        A lane's first event blocks while its topic is looked up, for up to 5 s.

        Args:
            headers: travel with the event; ``traceparent`` goes on to the feature.
            on_delivery: called with each acknowledgement, from within ``produce`` or ``flush``.

        Raises:
            InvalidEvent: the event breaks the contract; nothing was sent.
            DeliveryFailed: earlier events failed; this one was not taken.
            ConfigError: no broker, no such lane, no such topic.
        """
        assert not self._closed, "the producer is closed"
        self._raise_failure()
        topic = self._connection.topics.get(lane) or self._connection.look_up(lane)
        done = partial(self._acknowledge, on_delivery)
        message = self._connection.encode(event, topic, headers)
        while not self._connection.try_put(message, done):
            self._producer.poll(_STEP_S)
            self._raise_failure()
        self._num_produced += 1
        self._producer.poll(0)

    def flush(self, timeout_s: float | None = None) -> None:
        """Blocks until every event is acknowledged or has failed; at most ``timeout_s``.

        Raises DeliveryFailed, also for events that are still on their way after ``timeout_s``.
        """
        if timeout_s is None:
            timeout_s = self._delivery_timeout_s + 5
        deadline_s = time.monotonic() + timeout_s
        while left := self._producer.flush(_STEP_S):
            if time.monotonic() >= deadline_s:
                break
        self._raise_failure()
        if left:
            raise DeliveryTimedOut(
                f"{left} events are not acknowledged after {timeout_s:g} s", left
            )

    def close(self, timeout_s: float | None = None) -> None:
        """Flushes and ends. May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            self.flush(timeout_s)
        finally:
            self._producer.purge()

    def statistics(self) -> ProducerStatistics:
        """Counters so far, as of the last ``produce`` or ``flush``."""
        return ProducerStatistics(self._num_produced, self._num_acknowledged, self._num_failed)

    def _acknowledge(
        self,
        on_delivery: Callable[[Delivery], None] | None,
        error: KafkaError | None,
        message: Message,
    ) -> None:
        if (error := self._deliveries.error(error, message)) is None:
            self._num_acknowledged += 1
            if on_delivery:
                on_delivery(_delivery(message))
            return
        self._num_failed += 1
        self._num_unraised += 1
        self._failure = self._failure or (error, message.topic() or "")

    def _raise_failure(self) -> None:
        if self._failure is None:
            return
        (error, topic), num_events = self._failure, self._num_unraised
        self._failure, self._num_unraised = None, 0
        raise self._connection.failure(error, topic, num_events)


class AsyncMarketEventProducer:
    """Produces market events from one event loop; each ``send`` waits for its acknowledgement.

    Throughput comes from many sends at once (``asyncio.TaskGroup``); up to ``max_in_flight`` of
    them wait for the broker, further ones wait for a place. Use it as ``async with``.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        delivery_timeout_s: float = 30,
        max_in_flight: int = 10_000,
        **overrides: Any,
    ) -> None:
        self._connection = _Connection(settings_or_load(settings, overrides), delivery_timeout_s)
        self._producer: Producer = self._connection.producer
        self._deliveries = Deliveries()
        self._max_in_flight = max_in_flight
        self._turn = asyncio.Lock()  # first come, first served: sends keep their order
        self._moved = asyncio.Event()
        self._num_produced = self._num_acknowledged = self._num_failed = 0
        self._answers: list[tuple[asyncio.Future[Delivery], KafkaError | None, Message]] = []
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def send(
        self, event: MarketEvent, *, lane: str = DEFAULT_LANE, headers: Headers = ()
    ) -> Delivery:
        """Produces one event and waits until all in-sync replicas have it.

        Sends that are started in order arrive in order per symbol. Cancelling a send does not take
        the event back.

        Raises:
            InvalidEvent: the event breaks the contract; nothing was sent.
            DeliveryFailed: the broker did not take it.
            ConfigError: no broker, no such lane, no such topic.
        """
        assert not self._closing.is_set(), "the producer is closed"
        async with self._turn:
            answer = await self._put(event, lane, headers)
        return await answer

    async def _put(
        self, event: MarketEvent, lane: str, headers: Headers
    ) -> asyncio.Future[Delivery]:
        topic = self._connection.topics.get(lane)
        if topic is None:
            topic = await asyncio.to_thread(self._connection.look_up, lane)
        message = self._connection.encode(event, topic, headers)
        answer: asyncio.Future[Delivery] = asyncio.get_running_loop().create_future()
        note = partial(self._note, answer)
        self._start()
        while self.statistics().num_in_flight >= self._max_in_flight or (
            not self._connection.try_put(message, note)
        ):
            self._moved.clear()
            await self._moved.wait()
        self._num_produced += 1
        return answer

    async def close(self) -> None:
        """Waits until every event is acknowledged or has failed, and ends the thread."""
        if self._closing.is_set():
            return
        try:
            while self.statistics().num_in_flight:
                self._moved.clear()
                await self._moved.wait()
        finally:
            self._closing.set()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def statistics(self) -> ProducerStatistics:
        """Counters so far."""
        return ProducerStatistics(self._num_produced, self._num_acknowledged, self._num_failed)

    def _start(self) -> None:
        if self._thread is None:
            assert self._max_in_flight >= 1
            loop = asyncio.get_running_loop()
            self._thread = threading.Thread(
                target=self._serve, args=(loop,), name="produce", daemon=True
            )
            self._thread.start()

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """The thread: one hand-over to the loop for all acknowledgements of one poll."""
        while not self._closing.is_set() and not loop.is_closed():
            self._producer.poll(_STEP_S)
            if self._answers:
                answers, self._answers = self._answers, []
                loop.call_soon_threadsafe(self._resolve, answers)

    def _note(
        self, answer: asyncio.Future[Delivery], error: KafkaError | None, message: Message
    ) -> None:
        self._answers.append((answer, self._deliveries.error(error, message), message))

    def _resolve(
        self, answers: list[tuple[asyncio.Future[Delivery], KafkaError | None, Message]]
    ) -> None:
        self._moved.set()
        for answer, error, message in answers:
            if error is None:
                self._num_acknowledged += 1
            else:
                self._num_failed += 1
            if answer.done():
                continue  # its send was cancelled
            if error is None:
                answer.set_result(_delivery(message))
            else:
                answer.set_exception(self._connection.failure(error, message.topic() or ""))


def _delivery(message: Message) -> Delivery:
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None
    assert partition is not None
    appended_us = None if offset is None else message.timestamp()[1] * 1000
    return Delivery(topic, partition, offset, appended_us)
