"""``tapeline audit``: reads what went in and what came out, and proves what was promised.

Reading only; ``tapeline.ledger`` judges. The order of reading is part of the proof: first how far
the workers have committed, then the input up to its end of that moment, then all outputs to theirs.
So whatever must have an end has it among the outputs that are read.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import cast

from confluent_kafka import Consumer, IsolationLevel, KafkaError, Message, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec

from consumers.channels import channel_set
from consumers.envelopes import REPLAYED_FROM_HEADER
from schemas.codec import Codec
from schemas.errors import PoisonRecord, TransientError
from schemas.kafka import client_config, consume_ready, make_client, message_headers
from schemas.lanes import LaneSettings
from schemas.messages import FeatureVector, Flags, Headers
from schemas.settings import Settings
from tapeline.bookkeeping import Event, Sightings, Source
from tapeline.clients import ask_broker, check_kafka, list_offsets, make_admin
from tapeline.dlq.letters import RECEIPT_HEADER
from tapeline.lag import lane_lags
from tapeline.ledger import Delivery, Feature, LaneAudit, Ledger, Letter, Violation, judge

ShowProgress = Callable[[int, int], None]

_POLL_S = 0.5
_MAX_POLLED = 5_000
_PAUSE_S = 0.05
_DIGEST_BYTES = 16
# Flags that say how a feature came about, not what it is: another pass may give others.
_HOW_MADE = Flags.STALE | Flags.CACHED | Flags.SKIPPED


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What the ledgers of some lanes say.

    Attributes:
        lanes: first rank first.
        violations: the first of each lane, by the time of their records.
        duplicates: ids of events published more than once, each once.
        num_read: records read of all topics.
    """

    delivery: Delivery
    settled: bool
    lanes: tuple[LaneAudit, ...]
    violations: tuple[Violation, ...]
    duplicates: tuple[str, ...]
    num_read: int
    seconds: float

    @property
    def is_clean(self) -> bool:
        """No violation in any lane."""
        return not self.violations

    @property
    def first_violation(self) -> Violation | None:
        """The one whose record was appended first."""
        return self.violations[0] if self.violations else None


def audit(
    settings: Settings,
    lanes: Sequence[str] | None = None,
    *,
    settled: bool = False,
    delivery: Delivery | None = None,
    max_violations: int = 20,
    progress: ShowProgress | None = None,
) -> AuditReport:
    """Reads the lanes' topics to their ends and judges them.

    While ids count across lanes the others are read, too, for they may hold the first of two
    copies; they are not judged. Blocks for as long as reading takes, and until transactions that
    are open on the outputs have ended.

    Args:
        lanes: names; None: all that are enabled.
        settled: everything has been worked off: every record must have its end. Else only those
            below the committed offset must.
        delivery: the promise to hold them to; None: ``settings.worker.delivery``.
        max_violations: kept of each lane; all are counted.
        progress: told now and then how many offsets of how many have been passed.

    Raises:
        ConfigError: no broker answers, or a topic or lane does not exist.
        TransientError: the broker answers, but not this, or a transaction stays open.
    """
    began_s = time.monotonic()
    delivery = delivery or settings.worker.delivery
    chosen = _chosen(settings, lanes)
    found = check_kafka(settings, _topics(chosen))
    ledgers = _ledgers(settings, chosen, found, delivery, max_violations)
    reading = _Reading(settings, ledgers, found, progress or (lambda passed, total: None))
    ends = reading.read()
    judge(ends, settled=settled, asked_us=reading.asked_us)
    judged = [one for one in ledgers if one.lane in chosen]
    violations = [violation for one in judged for violation in one.violations()]
    return AuditReport(
        delivery=delivery,
        settled=settled,
        lanes=tuple(one.audit() for one in judged),
        violations=tuple(sorted(violations, key=lambda one: one.at_us)),
        duplicates=tuple(dict.fromkeys(name for one in judged for name in one.repeated_ids)),
        num_read=reading.num_read,
        seconds=time.monotonic() - began_s,
    )


def _ledgers(
    settings: Settings,
    chosen: Sequence[LaneSettings],
    topics: Mapping[str, int],
    delivery: Delivery,
    max_violations: int,
) -> list[Ledger]:
    """One for each lane to judge, and for each that shares their first-seen ids."""
    across = settings.redis.across_lanes
    others = [one for one in settings.active_lanes if topics.keys() >= {*_topics([one])}]
    # Without Redis a worker remembers ids for as long as it lives, which is nobody's promise.
    ttl_s = settings.redis.ttl_s if settings.redis.url else 0
    shared = Sightings(ttl_s)
    return [
        Ledger(
            lane, settings.window, shared if across else Sightings(ttl_s), delivery, max_violations
        )
        for lane in (others if across else chosen)
    ]


class _Reading:
    """One pass over the topics of some lanes, into their ledgers."""

    def __init__(
        self,
        settings: Settings,
        ledgers: Sequence[Ledger],
        num_partitions: Mapping[str, int],
        progress: ShowProgress,
    ) -> None:
        self.num_read = 0
        self.asked_us = 0
        """When it was known how far the workers had committed; Unix epoch."""
        self._settings = settings
        self._ledgers = ledgers
        self._num_partitions = num_partitions
        self._progress = progress
        self._passed = self._total = 0
        self._spans: dict[tuple[str, int], tuple[int, int]] = {}
        self._codec = Codec(settings.schema_registry)
        self._channels = channel_set(settings.window.channel_set)
        self._admin = make_admin(settings)

    def read(self) -> dict[Ledger, dict[int, int]]:
        """Fills the ledgers; with each, the ends of its partitions when all outputs were read."""
        lanes = [ledger.lane for ledger in self._ledgers]
        lags = lane_lags(self._settings, lanes)
        self.asked_us = time.time_ns() // 1000
        inputs = self._partitions(lane.topic for lane in lanes)
        outputs = self._partitions(
            topic for lane in lanes for topic in (lane.output_topic, lane.dlq_topic)
        )
        firsts = list_offsets(self._admin, self._settings, [*inputs, *outputs], latest=False)
        ends = {(one.topic, one.partition): one.end for one in lags} | self._stable_ends(outputs)
        self._spans = {where: (min(firsts[where], end), end) for where, end in ends.items()}
        self._total = sum(end - first for first, end in self._spans.values())

        for ledger in self._ledgers:
            for one in lags:
                if one.lane == ledger.lane.name:
                    first, end = self._spans[one.topic, one.partition]
                    ledger.add_partition(one.partition, first, end, one.committed)
            self._read_topic(ledger.lane.topic, partial(self._record, ledger))
        for topic in dict.fromkeys(lane.output_topic for lane in lanes):
            self._read_features(topic)
        for ledger in self._ledgers:
            add = partial(self._letter, ledger)
            ledger.letters_gone_until_us = self._read_topic(ledger.lane.dlq_topic, add)
        self._progress(self._total, self._total)
        newest = list_offsets(self._admin, self._settings, inputs, latest=True)
        return {
            ledger: {one[1]: end for one, end in newest.items() if one[0] == ledger.lane.topic}
            for ledger in self._ledgers
        }

    def _read_features(self, topic: str) -> None:
        sharing = {one.lane.name: one for one in self._ledgers if one.lane.output_topic == topic}
        gone_until_us = self._read_topic(topic, partial(self._feature, sharing))
        for ledger in sharing.values():
            ledger.features_gone_until_us = gone_until_us

    def _record(self, ledger: Ledger, message: Message) -> None:
        value, headers = message.value(), message_headers(message)
        event = self._event(value, headers)
        ledger.add_record(
            *_at(message)[1:],
            event,
            message.timestamp()[1] * 1000,
            digest=_digest(value or b"") if event is None else None,
            replayed_from=_replayed_from(headers) if headers else None,
        )

    def _event(self, value: bytes | None, headers: Headers) -> Event | None:
        """What the record says; None if it is poison."""
        if value is not None and len(value) > self._settings.worker.max_message_bytes:
            return None
        try:
            event = self._codec.decode_event(value, headers)
            self._channels.check(event)
        except PoisonRecord:
            return None
        venue, symbol = sys.intern(event.venue), sys.intern(event.symbol)
        return Event(event.event_id, venue, symbol, event.event_time_us)

    def _feature(self, sharing: Mapping[str, Ledger], message: Message) -> None:
        at, appended_us = _at(message), message.timestamp()[1] * 1000
        try:
            feature = self._codec.decode_feature(message.value(), message_headers(message))
        except PoisonRecord as poison:
            next(iter(sharing.values())).add_stray(at, appended_us, f"it is no feature: {poison}")
            return
        ledger = sharing.get(feature.lane)
        if ledger is not None:
            ledger.add_feature(
                Feature(
                    at,
                    Source(feature.source_topic, feature.source_partition, feature.source_offset),
                    Event(feature.event_id, feature.venue, feature.symbol, feature.event_time_us),
                    _bits(feature),
                    appended_us,
                )
            )

    def _letter(self, ledger: Ledger, message: Message) -> None:
        headers = message_headers(message)
        if any(name == RECEIPT_HEADER for name, _ in headers):
            return
        at, appended_us = _at(message), message.timestamp()[1] * 1000
        try:
            letter = self._codec.decode_dead_letter(message.value(), headers)
        except PoisonRecord as poison:
            ledger.add_stray(at, appended_us, f"it is no dead letter: {poison}")
            return
        source = Source(letter.source_topic, letter.source_partition, letter.source_offset)
        event = self._event(letter.value, letter.headers)
        digest = _digest(letter.value or b"")
        ledger.add_letter(Letter(at, source, letter.stage, event, digest, appended_us))

    def _read_topic(self, topic: str, add: Callable[[Message], None]) -> float:
        """Reads all that is committed up to the ends.

        An end is an offset, not a count: aborted records and the marks of transactions leave gaps.

        Returns:
            The time in us until which records may have been deleted; -1 if none were.
        """
        spans = [(one, *self._spans[topic, one]) for one in range(self._num_partitions[topic])]
        begins = {one: first for one, first, _ in spans}
        left = {one: end for one, first, end in spans if first < end}
        gone_until_us = {one: float("inf") for one, first in begins.items() if first > 0}
        consumer = self._consumer()
        consumer.assign([TopicPartition(topic, one, begins[one]) for one in left])
        try:
            heard_s = time.monotonic()
            while left:
                messages = consume_ready(consumer, _MAX_POLLED, _POLL_S)
                if messages:
                    heard_s = time.monotonic()
                elif time.monotonic() - heard_s > self._settings.kafka.timeout_s:
                    raise TransientError(
                        f"{topic} stays silent at partitions {sorted(left)}; look at the broker"
                    )
                for message in messages:
                    self._take(message, left, gone_until_us, add)
                self._passed += len(messages)
                self._progress(min(self._passed, self._total), self._total)
        finally:
            consumer.close()
        return max(gone_until_us.values(), default=-1.0)

    def _take(
        self,
        message: Message,
        left: dict[int, int],
        gone_until_us: dict[int, float],
        add: Callable[[Message], None],
    ) -> None:
        _, partition, offset = _at(message)
        if (error := message.error()) is not None:
            if error.code() == KafkaError._PARTITION_EOF:
                left.pop(partition, None)
            elif error.fatal() or not error.retriable():
                raise TransientError(f"{message.topic()} cannot be read: {error.str()}")
            return
        end = left.get(partition)
        if end is None:
            return
        if offset < end:
            if gone_until_us.get(partition) == float("inf"):
                gone_until_us[partition] = message.timestamp()[1] * 1000
            self.num_read += 1
            add(message)
        if offset >= end - 1:
            del left[partition]

    def _stable_ends(self, partitions: Sequence[TopicPartition]) -> dict[tuple[str, int], int]:
        """The ends of the outputs, once every transaction that was open below them has ended."""
        ends = _high_watermarks(self._admin, self._settings, partitions)
        patience_s = self._settings.worker.transaction_timeout_s + self._settings.kafka.timeout_s
        deadline_s = time.monotonic() + patience_s
        while True:
            stable = list_offsets(self._admin, self._settings, partitions, latest=True)
            waiting = [one for one, end in ends.items() if stable[one] < end]
            if not waiting:
                return ends
            if time.monotonic() > deadline_s:
                raise TransientError(
                    f"a transaction stays open on {waiting[0][0]}:{waiting[0][1]} at offset "
                    f"{stable[waiting[0]]}; look for a producer without a transaction timeout"
                )
            time.sleep(_PAUSE_S)

    def _partitions(self, topics: Iterable[str]) -> list[TopicPartition]:
        return [
            TopicPartition(topic, number)
            for topic in dict.fromkeys(topics)
            for number in range(self._num_partitions[topic])
        ]

    def _consumer(self) -> Consumer:
        consumer: Consumer = make_client(
            Consumer,
            client_config(
                self._settings,
                defaults={"client.id": "tapeline-audit", "fetch.queue.backoff.ms": 5},
                required={
                    "group.id": "tapeline-audit",  # never joined
                    "enable.auto.commit": False,
                    "enable.partition.eof": True,
                    "auto.offset.reset": "error",
                    "isolation.level": "read_committed",
                },
            ),
        )
        return consumer


def _high_watermarks(
    admin: AdminClient, settings: Settings, partitions: Sequence[TopicPartition]
) -> dict[tuple[str, int], int]:
    """The ends with whatever open transactions have written. Raises TransientError."""
    wanted = {one: OffsetSpec.latest() for one in partitions}  # type: ignore[no-untyped-call]

    def ask() -> dict[tuple[str, int], int]:
        answers = admin.list_offsets(
            wanted,
            isolation_level=IsolationLevel.READ_UNCOMMITTED,
            request_timeout=settings.kafka.timeout_s,
        )
        return {
            (one.topic, one.partition): answer.result(settings.kafka.timeout_s + 1).offset
            for one, answer in answers.items()
        }

    return ask_broker(ask, "where its topics end", settings)


def _chosen(settings: Settings, names: Sequence[str] | None) -> list[LaneSettings]:
    """The lanes of these names, first rank first. Raises ConfigError for one that is not there."""
    if names is None:
        return settings.active_lanes
    wanted = [settings.lane(name).name for name in names]
    return [lane for lane in settings.active_lanes if lane.name in wanted]


def _topics(lanes: Sequence[LaneSettings]) -> list[str]:
    return [topic for one in lanes for topic in (one.topic, one.output_topic, one.dlq_topic)]


def _at(message: Message) -> Source:
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    return Source(cast("str", topic), cast("int", partition), cast("int", offset))


def _bits(feature: FeatureVector) -> bytes:
    """A digest of what the model said, and of what the subscriber was told about it."""
    said = blake2b(feature.features.tobytes(), digest_size=_DIGEST_BYTES)
    flags = int(feature.flags & ~_HOW_MADE)
    said.update(repr((sorted(feature.scores.items()), flags)).encode())
    return said.digest()


def _digest(value: bytes) -> bytes:
    return blake2b(value, digest_size=_DIGEST_BYTES).digest()


def _replayed_from(headers: Headers) -> Source | None:
    """The record that failed, as the header of its replay names it."""
    for name, value in headers:
        if name == REPLAYED_FROM_HEADER:
            topic, _, rest = (value or b"").decode(errors="replace").partition(":")
            number, _, offset = rest.partition(":")
            if number.isdecimal() and offset.isdecimal():
                return Source(topic, int(number), int(offset))
    return None
