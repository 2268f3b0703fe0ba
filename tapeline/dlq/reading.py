"""Dead-letter topics as they stand at one moment: no group, no commits, committed records only."""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

from confluent_kafka import OFFSET_END, Consumer, KafkaError, Message, TopicPartition

from schemas.codec import Codec
from schemas.errors import TransientError
from schemas.kafka import client_config, consume_ready, make_client, message_headers
from schemas.lanes import LaneSettings
from schemas.settings import Settings
from tapeline.clients import ask_broker, check_kafka, list_offsets, make_admin
from tapeline.dlq.index import EVERYTHING, Index, Place, fold
from tapeline.dlq.letters import Letter, LetterId, Receipt, Record, Selection, Unreadable, classify

ShowProgress = Callable[[int, int], None]
"""Called with how many offsets are read, and how many there are to read."""

_POLL_S = 0.1  # how long Ctrl-C may have to wait
_MAX_POLLED = 500
_PROGRESS_EVERY = 128  # records
_CLOCK_SKEW_MS = 600_000  # between the worker that dates a letter and the broker that appends it


class Span(NamedTuple):
    """Offsets of one partition: the first to read, and the one after the last."""

    start: int
    end: int


def read_index(
    settings: Settings, selection: Selection = EVERYTHING, progress: ShowProgress | None = None
) -> Index:
    """What the selection holds now, with states. Blocks while it reads the topics once.

    Raises:
        ConfigError: no broker, no such lane, no such topic.
        TransientError: the broker fell silent on the way.
    """
    spans = snapshot(settings, selection)
    return fold(read_records(settings, spans, progress), selection)


def read_letters(
    settings: Settings, ids: Collection[LetterId], progress: ShowProgress | None = None
) -> Iterator[Letter | Unreadable]:
    """What has these ids, whole, one after another; in each partition by offset.

    Holds some of them in memory at a time, 64 MiB at most. Those that are gone are left out.
    Raises as ``read_index`` does.
    """
    wanted: defaultdict[Place, list[int]] = defaultdict(list)
    for lane, partition, offset in sorted(ids):
        wanted[lane, partition].append(offset)
    spans = {place: Span(offsets[0], offsets[-1] + 1) for place, offsets in wanted.items()}
    for record in read_records(settings, spans, progress):
        lane, partition, offset = record.id
        offsets = wanted[lane, partition]
        found = bisect_left(offsets, offset)
        if found < len(offsets) and offsets[found] == offset and not isinstance(record, Receipt):
            yield record


def snapshot(settings: Settings, selection: Selection = EVERYTHING) -> dict[Place, Span]:
    """The offsets to read for a selection and for every receipt of what it holds.

    Raises as ``read_index`` does.
    """
    lanes = selected_lanes(settings, selection)
    num_partitions = check_kafka(settings, [lane.dlq_topic for lane in lanes])
    partitions = {
        TopicPartition(lane.dlq_topic, number): (lane.name, number)
        for lane in lanes
        for number in range(num_partitions[lane.dlq_topic])
    }
    admin = make_admin(settings)
    begin = list_offsets(admin, settings, partitions, latest=False)
    end = list_offsets(admin, settings, partitions, latest=True)
    spans = {
        place: Span(begin[one.topic, one.partition], end[one.topic, one.partition])
        for one, place in partitions.items()
    }
    if selection.since_us is not None:
        later = _offsets_since(settings, list(partitions), selection.since_us)
        for one, place in partitions.items():
            first = later[one.topic, one.partition]
            start, stop = spans[place]
            spans[place] = Span(stop if first == OFFSET_END else max(start, first), stop)
    if selection.ids:
        spans = {
            place: Span(max(spans[place].start, first), spans[place].end)
            for place, first in _first_offsets(selection.ids).items()
            if place in spans
        }
    return spans


def selected_lanes(settings: Settings, selection: Selection) -> list[LaneSettings]:
    """The lanes that a selection names, else all that are enabled. Raises ConfigError."""
    names = dict.fromkeys([*selection.lanes, *(id.lane for id in selection.ids)])
    return [settings.lane(name) for name in names] or list(settings.active_lanes)


def _first_offsets(ids: Collection[LetterId]) -> dict[Place, int]:
    first: dict[Place, int] = {}
    for lane, partition, offset in ids:
        first[lane, partition] = min(offset, first.get((lane, partition), offset))
    return first


def _offsets_since(
    settings: Settings, partitions: list[TopicPartition], since_us: int
) -> Mapping[tuple[str, int], int]:
    appended_ms = max(0, since_us // 1000 - _CLOCK_SKEW_MS)
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
    return {(one.topic, one.partition): one.offset for one in found}


def _consumer(settings: Settings) -> Consumer:
    consumer: Consumer = make_client(
        Consumer,
        client_config(
            settings,
            defaults={
                "group.id": "tapeline-dlq",  # librdkafka wants one; nothing is joined or committed
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


def read_records(
    settings: Settings, spans: Mapping[Place, Span], progress: ShowProgress | None = None
) -> Iterator[Record]:
    """Letters, receipts and strangers of the spans. Raises as ``read_index`` does."""
    codec = Codec(settings.schema_registry)
    lane_of = {settings.lane(lane).dlq_topic: lane for lane, _ in spans}
    for message in _messages(settings, spans, progress):
        id = LetterId(
            lane_of[message.topic() or ""], message.partition() or 0, message.offset() or 0
        )
        headers = message_headers(message)
        appended_us = message.timestamp()[1] * 1000
        yield classify(codec, id, message.key(), message.value(), headers, appended_us)


def _messages(
    settings: Settings, spans: Mapping[Place, Span], progress: ShowProgress | None = None
) -> Iterator[Message]:
    """Every record of the spans. A partition ends at the broker's word, not by a count.

    Offsets have gaps: transaction markers, aborted records, what retention took.
    """
    ends = {
        (settings.lane(lane).dlq_topic, partition): span
        for (lane, partition), span in spans.items()
        if span.start < span.end
    }
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
                f"the broker at {settings.kafka.bootstrap_servers} gave no dead letters for "
                f"{settings.kafka.timeout_s:g} s ({last_error}); look at its health, then try again"
            )
