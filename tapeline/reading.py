"""Topics as they stand at one moment: no group, no commits, committed records only."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from confluent_kafka import OFFSET_END, Consumer, KafkaError, Message, TopicPartition

from schemas.errors import ConfigError, TransientError
from schemas.kafka import client_config, consume_ready, make_client
from schemas.settings import Settings
from tapeline.clients import ask_broker, check_kafka, list_offsets, make_admin

ShowProgress = Callable[[int, int], None]
"""Called with how many offsets are read, and how many there are to read."""
TopicPlace = tuple[str, int]
"""Topic and partition."""

_POLL_S = 0.1  # how long Ctrl-C may have to wait
_MAX_POLLED = 500
_PROGRESS_EVERY = 128  # records
_BACK = re.compile(r"(\d{1,9})([smhd])", re.ASCII)
_US_PER_UNIT = {"s": 10**6, "m": 60 * 10**6, "h": 3600 * 10**6, "d": 86_400 * 10**6}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Span(NamedTuple):
    """Offsets of one partition: the first to read, and the one after the last."""

    start: int
    end: int


def spans_between(
    settings: Settings,
    topics: Sequence[str],
    since_us: int | None = None,
    until_us: int | None = None,
) -> dict[TopicPlace, Span]:
    """The offsets of all partitions whose records were appended in that time.

    Raises:
        ConfigError: no broker, no such topic.
        TransientError: the broker does not answer this.
    """
    num_partitions = check_kafka(settings, topics)
    partitions = [
        TopicPartition(topic, number) for topic in topics for number in range(num_partitions[topic])
    ]
    admin = make_admin(settings)
    begins = list_offsets(admin, settings, partitions, latest=False)
    ends = list_offsets(admin, settings, partitions, latest=True)
    since, until = (
        {} if at_us is None else _offsets_at(settings, partitions, at_us)
        for at_us in (since_us, until_us)
    )
    spans = {}
    for place, end in ends.items():
        stop = min(until.get(place, end), end)
        spans[place] = Span(min(max(since.get(place, 0), begins[place]), stop), stop)
    return spans


def parse_time_us(text: str, now_us: int) -> int:
    """An ISO time (UTC unless it names its zone), or a span back from now: 90s, 30m, 2h, 7d.

    Raises ConfigError.
    """
    if back := _BACK.fullmatch(text):
        return now_us - int(back[1]) * _US_PER_UNIT[back[2]]
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{text!r} is no time; write it as 2024-08-08T12:00, or as a span back from now: 2h, 7d"
        ) from None
    if time.tzinfo is None:
        time = time.replace(tzinfo=UTC)
    since_epoch = time - _EPOCH
    return (since_epoch.days * 86_400 + since_epoch.seconds) * 10**6 + since_epoch.microseconds


def _offsets_at(
    settings: Settings, partitions: Sequence[TopicPartition], at_us: int
) -> dict[TopicPlace, int]:
    """The first offset appended at that time or later; where there is none, one above all."""
    appended_ms = max(0, at_us // 1000)
    wanted = [TopicPartition(one.topic, one.partition, appended_ms) for one in partitions]
    consumer = _consumer(settings)
    try:
        found = ask_broker(
            lambda: consumer.offsets_for_times(wanted, timeout=settings.kafka.timeout_s),
            "which offsets follow a time",
            settings,
        )
    finally:
        consumer.close()
    return {
        (one.topic, one.partition): 2**63 - 1 if one.offset == OFFSET_END else one.offset
        for one in found
    }


def read_spans(
    settings: Settings, spans: Mapping[TopicPlace, Span], progress: ShowProgress | None = None
) -> Iterator[Message]:
    """Every record of the spans, in each partition by offset. Blocks while it reads.

    A partition ends at the broker's word, not by a count: offsets have gaps (transaction markers,
    aborted records, what retention took). Raises TransientError when the broker falls silent.
    """
    ends = {where: span for where, span in spans.items() if span.start < span.end}
    if not ends:
        return
    num_offsets = sum(span.end - span.start for span in ends.values())
    position = {where: span.start for where, span in ends.items()}
    unfinished = set(ends)
    consumer = _consumer(settings)
    try:
        consumer.assign([TopicPartition(*where, offset) for where, offset in position.items()])
        for number, message in enumerate(_polled(consumer, settings)):
            where = (message.topic() or "", message.partition() or 0)
            offset, end = message.offset() or 0, ends[where].end
            is_record = message.error() is None
            if is_record and position[where] <= offset < end:
                yield message
            position[where] = offset + is_record
            if position[where] >= end and where in unfinished:
                unfinished.discard(where)
                consumer.pause([TopicPartition(*where)])
            if progress is not None and (number % _PROGRESS_EVERY == 0 or not unfinished):
                left = sum(max(0, ends[one].end - position[one]) for one in ends)
                progress(num_offsets - left, num_offsets)
            if not unfinished:
                return
    finally:
        consumer.close()


def _consumer(settings: Settings) -> Consumer:
    consumer: Consumer = make_client(
        Consumer,
        client_config(
            settings,
            defaults={
                "group.id": "tapeline-reading",  # librdkafka wants one; nothing is committed
                "queued.max.messages.kbytes": 65_536,
                "fetch.queue.backoff.ms": 10,
            },
            required={
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
            },
        ),
    )
    return consumer


def _polled(consumer: Consumer, settings: Settings) -> Iterator[Message]:
    """Records and ends of partitions. Raises TransientError when nothing comes any more."""
    last_error = "no answer"
    deadline_s = time.monotonic() + settings.kafka.timeout_s
    while True:
        for message in consume_ready(consumer, _MAX_POLLED, _POLL_S):
            error = message.error()
            if error is not None and error.code() != KafkaError._PARTITION_EOF:
                last_error = error.str()
                continue
            yield message
            deadline_s = time.monotonic() + settings.kafka.timeout_s
        if time.monotonic() >= deadline_s:
            raise TransientError(
                f"the broker at {settings.kafka.bootstrap_servers} gave no records for "
                f"{settings.kafka.timeout_s:g} s ({last_error}); look at its health, then try again"
            )
