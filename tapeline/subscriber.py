"""Features out: the subscribing half of the client library, for ``for`` and for ``async for``."""

import asyncio
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition
from confluent_kafka import Message as KafkaMessage

from schemas.codec import Codec
from schemas.errors import ConfigError, PoisonRecord, TransientError
from schemas.kafka import LOGGER, client_config, make_client, message_headers
from schemas.messages import FeatureVector, Headers
from schemas.settings import Settings
from schemas.timing import TIMING_HEADER, parse_timing
from tapeline.clients import check_kafka, list_offsets, make_admin, missing_topic, settings_or_load

Start = Literal["latest", "earliest", "committed"]
Position = tuple[str, int, int]  # topic, partition, offset

_POLL_S = 0.1  # how long a close may have to wait for a poll
_MAX_POLLED = 256
_RESET = {"latest": "latest", "earliest": "earliest", "committed": "earliest"}


@dataclass(frozen=True, slots=True, eq=False)
class FeatureRecord:
    """A feature vector and where it came from.

    Attributes:
        topic, partition, offset: of the feature's own record; its source's are in ``feature``.
        appended_us: the broker's clock when the feature was appended, Unix epoch; Kafka keeps
            milliseconds.
    """

    feature: FeatureVector
    topic: str
    partition: int
    offset: int
    appended_us: int
    headers: Headers

    @property
    def latency_us(self) -> int | None:
        """From the event's append to the feature's."""
        if self.source_appended_us is None:
            return None
        return self.appended_us - self.source_appended_us

    @property
    def source_appended_us(self) -> int | None:
        """``appended_us`` of the event that completed the window; None if not known."""
        return self.feature.source_appended_us or None

    @property
    def timing_ms(self) -> Mapping[str, float]:
        """Milliseconds by stage up to the model's answer; empty unless ``worker.timing_header``."""
        for name, value in self.headers:
            if name == TIMING_HEADER and value:
                return parse_timing(value)
        return {}


@dataclass(frozen=True, slots=True)
class SubscriberStatistics:
    """Records so far, each counted once: of other symbols or venues, undecodable, handed out."""

    num_features: int
    num_filtered: int
    num_undecodable: int


class _Read(NamedTuple):
    """One record that waits to be handed out."""

    position: Position
    outcome: FeatureRecord | PoisonRecord


class FeatureSubscriber:
    """An iterator over feature vectors as they are published; committed transactions only.

    Without a ``group`` it reads every partition itself and commits nothing. With one, its members
    share the partitions, and a feature counts as done when the next one is asked for or the
    subscriber is closed: after a crash the unfinished ones come again (at least once). Order holds
    per partition, so per symbol; lanes interleave.

    >>> with FeatureSubscriber(lanes=["realtime"]) as subscriber:
    ...     for feature in subscriber:
    ...         ...

    ``open``, ``with`` or the first iteration connects; "latest" means from that moment on, and with
    a group from the moment it hands out the partition. One thread or one event loop iterates;
    ``close`` may come from any thread and ends the iteration within 0.1 s.

    Args:
        lanes: names of lanes; None: all that are enabled.
        symbols, venues: hand out only these; None: all.
        start: where to begin; with a group, only in partitions where it has committed nothing yet.
            "committed" needs a group that has committed something, and reads partitions that are
            new to it from their beginning.
        idle_timeout_s: end the iteration when for so long no feature came.
        limit: end it after so many features.
        undecodable: what to do with a record that is no feature: "raise" PoisonRecord (the iterator
            stays good: the next call goes on behind it) or "skip"; both are counted.
        overrides: sections of the settings, when ``settings`` is not given.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        lanes: Iterable[str] | None = None,
        symbols: Collection[str] | None = None,
        venues: Collection[str] | None = None,
        group: str | None = None,
        start: Start = "latest",
        idle_timeout_s: float | None = None,
        limit: int | None = None,
        undecodable: Literal["raise", "skip"] = "raise",
        **overrides: Any,
    ) -> None:
        self._settings = settings_or_load(settings, overrides)
        if start not in _RESET:
            raise ConfigError(f"start cannot be {start!r}; it is one of {', '.join(_RESET)}")
        if start == "committed" and group is None:
            raise ConfigError("start 'committed' needs a group; give one, or start elsewhere")
        active = self._settings.active_lanes
        chosen = active if lanes is None else [self._settings.lane(name) for name in lanes]
        self._topics = [lane.output_topic for lane in chosen]
        self._symbols = None if symbols is None else {name.encode() for name in symbols}
        self._venues = None if venues is None else frozenset(venues)
        self._group, self._start = group, start
        self._idle_timeout_s, self._limit = idle_timeout_s, limit
        self._raises = undecodable == "raise"
        self._codec = Codec(self._settings.schema_registry)
        self._consumer: Consumer | None = None
        self._messages: deque[KafkaMessage] = deque()  # polled, not yet decoded
        self._ready: deque[_Read] = deque()
        self._handed: Position | None = None  # the last one, not yet known to be done
        self._num_features = self._num_filtered = self._num_undecodable = 0
        self._closing = threading.Event()
        self._polling = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._poll_ahead: asyncio.Future[None] | None = None

    def open(self) -> None:
        """Connects, and fixes where reading begins. Blocks for some milliseconds, at most 5 s
        if no broker answers.

        Raises ConfigError: no broker, or a topic that does not exist.
        """
        with self._polling:
            if self._consumer is None and not self._closing.is_set():
                self._consumer = self._connect()

    def close(self) -> None:
        """Ends the iteration, commits what is done (with a group), disconnects."""
        self._closing.set()
        with self._polling:
            if self._consumer is not None:
                self._store_handed()
                self._consumer.close()
                self._consumer = None
        if self._thread is not None:
            self._thread.shutdown(wait=False)

    def statistics(self) -> SubscriberStatistics:
        """Counters so far."""
        return SubscriberStatistics(self._num_features, self._num_filtered, self._num_undecodable)

    def records(self) -> "_Records":
        """The same iteration with topic, partition, offset and times; for both kinds of ``for``."""
        return _Records(self)

    def __iter__(self) -> Iterator[FeatureVector]:
        return self

    def __next__(self) -> FeatureVector:
        return self.next_record().feature

    def __aiter__(self) -> AsyncIterator[FeatureVector]:
        return self

    async def __anext__(self) -> FeatureVector:
        return (await self.next_record_async()).feature

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._handed = None  # whoever failed with it wants it again
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.open)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._handed = None
        await asyncio.to_thread(self.close)

    def next_record(self) -> FeatureRecord:
        """Blocks for the next feature; raises StopIteration at the end."""
        self.open()
        waiting_since_s = time.monotonic()
        while (record := self._take()) is None:
            if self._is_over(waiting_since_s):
                raise StopIteration
            self._poll()
        return record

    async def next_record_async(self) -> FeatureRecord:
        """Waits for the next feature; raises StopAsyncIteration at the end.

        Cancelling loses nothing: what a poll brings in the meantime is handed out next.
        """
        if self._consumer is None:
            await asyncio.to_thread(self.open)
        loop = asyncio.get_running_loop()
        waiting_since_s = time.monotonic()
        while (record := self._take()) is None:
            if self._is_over(waiting_since_s):
                raise StopAsyncIteration
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "subscribe")
            if self._poll_ahead is None:
                self._poll_ahead = loop.run_in_executor(self._thread, self._poll)
            poll = self._poll_ahead
            await asyncio.shield(poll)
            self._poll_ahead = None
        return record

    def _is_over(self, waiting_since_s: float) -> bool:
        idle_timeout_s = self._idle_timeout_s
        return (
            self._closing.is_set()
            or (self._limit is not None and self._num_features >= self._limit)
            or (idle_timeout_s is not None and time.monotonic() - waiting_since_s >= idle_timeout_s)
        )

    def _take(self) -> FeatureRecord | None:
        """The next record that was read, if there is one and it is wanted."""
        self._store_handed()
        if self._closing.is_set():
            return None
        while self._ready and (self._limit is None or self._num_features < self._limit):
            self._handed, outcome = self._ready.popleft()
            if isinstance(outcome, FeatureRecord):
                self._num_features += 1
                return outcome
            self._num_undecodable += 1
            if self._raises:
                raise outcome
            self._store_handed()
        return None

    def _store_handed(self) -> None:
        """The last record handed out is done: librdkafka commits it soon, and when it closes."""
        if self._handed is None:
            return
        (topic, partition, offset), self._handed = self._handed, None
        self._store([TopicPartition(topic, partition, offset + 1)])

    def _store(self, offsets: list[TopicPartition]) -> None:
        if self._group is None or self._consumer is None:
            return
        with suppress(KafkaException):  # a partition that went to another member: it reads it again
            self._consumer.store_offsets(offsets=offsets)

    def _poll(self) -> None:
        """Moves what has arrived into ``_ready``; waits for up to 0.1 s if that is nothing."""
        with self._polling:
            if self._consumer is None:
                return
            if not self._messages:
                # consume(n, t) would wait all of t for n messages
                self._messages += self._consumer.consume(1, _POLL_S)
                if self._messages:
                    self._messages += self._consumer.consume(_MAX_POLLED - 1, 0)
            self._decode_polled()

    def _decode_polled(self) -> None:
        """Raises TransientError while a Schema Registry is away; what is left stays for later."""
        passed: dict[tuple[str, int], int] = {}
        wanted = False
        while self._messages:
            message = self._messages[0]
            if error := message.error():
                self._messages.popleft()
                self._raise_unless_passing(error)
                continue
            outcome = self._decode(message)
            self._messages.popleft()
            topic, partition, offset = _position(message)
            if outcome is None:
                self._num_filtered += 1
                passed[topic, partition] = offset + 1
            else:
                self._ready.append(_Read((topic, partition, offset), outcome))
                wanted = True
        if passed and not wanted:  # so nothing in front of them is unfinished
            self._store([TopicPartition(*where, offset) for where, offset in passed.items()])

    def _decode(self, message: KafkaMessage) -> FeatureRecord | PoisonRecord | None:
        """The feature, or why it is none; None if it is of another symbol or venue."""
        if self._symbols is not None and message.key() not in self._symbols:
            return None
        topic, partition, offset = _position(message)
        headers = message_headers(message)
        try:
            feature = self._codec.decode_feature(message.value(), headers)
        except PoisonRecord as error:
            where = f"{topic} [{partition}] at offset {offset}"
            return PoisonRecord(error.stage, error.reason, f"{where} is no feature: {error}")
        if self._venues is not None and feature.venue not in self._venues:
            return None
        return FeatureRecord(
            feature,
            topic,
            partition,
            offset,
            message.timestamp()[1] * 1000,
            headers,
        )

    def _raise_unless_passing(self, error: KafkaError) -> None:
        if error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC):
            raise missing_topic(*self._topics, settings=self._settings)
        if error.code() in (
            KafkaError.TOPIC_AUTHORIZATION_FAILED,
            KafkaError.GROUP_AUTHORIZATION_FAILED,
        ):
            raise ConfigError(f"the broker forbids reading: {error.str()}; ask for the right")
        if error.fatal():
            raise TransientError(f"the subscriber's Kafka client gave up: {error.str()}")
        LOGGER.warning("subscriber: %s", error.str())  # librdkafka goes on trying

    def _connect(self) -> Consumer:
        partitions = check_kafka(self._settings, self._topics)
        consumer: Consumer = make_client(
            Consumer,
            client_config(
                self._settings,
                defaults={
                    "client.id": "tapeline-subscriber",
                    "fetch.queue.backoff.ms": 5,
                    "queued.min.messages": 10_000,
                    "partition.assignment.strategy": "cooperative-sticky",
                },
                required={
                    "group.id": self._group or f"tapeline-subscriber-{uuid.uuid4()}",
                    "enable.auto.commit": self._group is not None,
                    "enable.auto.offset.store": False,
                    "auto.commit.interval.ms": 1000,
                    "auto.offset.reset": _RESET[self._start] if self._group else "earliest",
                    "isolation.level": "read_committed",
                },
            ),
        )
        if self._group is None:
            consumer.assign(self._begin({topic: partitions[topic] for topic in self._topics}))
        else:
            if self._start == "committed":
                self._check_committed(consumer, partitions)
            consumer.subscribe(self._topics)
        return consumer

    def _check_committed(self, consumer: Consumer, num_partitions: Mapping[str, int]) -> None:
        asked = [
            TopicPartition(topic, partition)
            for topic in self._topics
            for partition in range(num_partitions[topic])
        ]
        known = consumer.committed(asked, timeout=self._settings.kafka.timeout_s)
        if all(one.offset < 0 for one in known):
            consumer.close()
            raise ConfigError(
                f"group {self._group} has committed nothing here; start at latest or earliest"
            )

    def _begin(self, num_partitions: Mapping[str, int]) -> list[TopicPartition]:
        """Where to read each partition from; the ends are looked up now, not at the first poll."""
        wanted = [
            TopicPartition(topic, partition)
            for topic, num in num_partitions.items()
            for partition in range(num)
        ]
        admin = make_admin(self._settings)
        found = list_offsets(admin, self._settings, wanted, latest=self._start == "latest")
        return [TopicPartition(*where, offset) for where, offset in found.items()]


class _Records:
    """The records of a subscriber; both an iterator and an async iterator."""

    def __init__(self, subscriber: FeatureSubscriber) -> None:
        self._subscriber = subscriber

    def __iter__(self) -> Iterator[FeatureRecord]:
        return self

    def __next__(self) -> FeatureRecord:
        return self._subscriber.next_record()

    def __aiter__(self) -> AsyncIterator[FeatureRecord]:
        return self

    async def __anext__(self) -> FeatureRecord:
        return await self._subscriber.next_record_async()


def _position(message: KafkaMessage) -> Position:
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None
    assert partition is not None
    assert offset is not None
    return topic, partition, offset
