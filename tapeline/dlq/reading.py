"""Dead-letter topics as they stand at one moment."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping

from schemas.codec import Codec
from schemas.kafka import message_headers
from schemas.lanes import LaneSettings
from schemas.settings import Settings
from tapeline.dlq.index import EVERYTHING, Index, Place, fold
from tapeline.dlq.letters import Letter, LetterId, Receipt, Record, Selection, Unreadable, classify
from tapeline.reading import ShowProgress, Span, read_spans, spans_between

_CLOCK_SKEW_US = 600_000_000  # between the worker that dates a letter and the broker's append


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
    lane_of = {lane.dlq_topic: lane.name for lane in selected_lanes(settings, selection)}
    since_us = None if selection.since_us is None else selection.since_us - _CLOCK_SKEW_US
    spans = {
        (lane_of[topic], partition): span
        for (topic, partition), span in spans_between(settings, [*lane_of], since_us).items()
    }
    if selection.ids:
        return {
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


def read_records(
    settings: Settings, spans: Mapping[Place, Span], progress: ShowProgress | None = None
) -> Iterator[Record]:
    """Letters, receipts and strangers of the spans. Raises as ``read_index`` does."""
    codec = Codec(settings.schema_registry)
    lane_of = {settings.lane(lane).dlq_topic: lane for lane, _ in spans}
    by_topic = {
        (settings.lane(lane).dlq_topic, partition): span
        for (lane, partition), span in spans.items()
    }
    for message in read_spans(settings, by_topic, progress):
        id = LetterId(
            lane_of[message.topic() or ""], message.partition() or 0, message.offset() or 0
        )
        headers = message_headers(message)
        appended_us = message.timestamp()[1] * 1000
        yield classify(codec, id, message.key(), message.value(), headers, appended_us)
