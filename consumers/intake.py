"""The way in: records become events, lose their duplicates, and fill windows."""

import asyncio
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consumers.assignments import Assignments
from consumers.dedup import FirstSeen
from consumers.envelopes import REPLAYED_FROM_HEADER
from consumers.metrics import LaneCounts
from consumers.offsets import PartitionProgress, Span
from consumers.records import Partition, Record
from consumers.retry import retrying
from consumers.windows import WindowStore
from schemas.codec import Codec
from schemas.errors import PoisonRecord
from schemas.lanes import LaneSettings
from schemas.messages import Flags, MarketEvent
from schemas.settings import Settings


class Item(NamedTuple):
    """A record on its way, with the assignment that it came by."""

    record: Record
    progress: PartitionProgress
    event: MarketEvent

    @property
    def is_live(self) -> bool:
        """A feature is owed; else it only rebuilds its window."""
        return self.record.offset >= self.progress.live_from


Letter = tuple[Record, PoisonRecord]


@dataclass(slots=True, eq=False)
class MicroBatch:
    """Records that go to the model together, and what is owed for them.

    Attributes:
        live: the records that are owed an end, in the order of their offsets per partition.
        items, flags: one each per window.
        windows: float32, (B, C, T).
        letters: poison records and why.
        taken_us, given_us: when its records left their queues, and when it was ready for the model.
        spans: what these records keep from being committed.
        turns: done when the earlier micro-batches of the same partitions are on their way out.
        published: done when this one is.
    """

    live: list[Record]
    items: list[Item]
    flags: NDArray[np.uint8]
    windows: NDArray[np.float32]
    letters: list[Letter]
    taken_us: int
    given_us: int
    spans: list[tuple[PartitionProgress, Span]]
    turns: list[asyncio.Future[None]]
    published: asyncio.Future[None]


class Intake:
    """Prepares micro-batches, strictly one after another: windows depend on the order."""

    def __init__(
        self,
        settings: Settings,
        first_seen: FirstSeen,
        assignments: Assignments,
        windows: WindowStore,
        codec: Codec,
        counts: Mapping[str, LaneCounts],
        clock: Callable[[], float],
    ) -> None:
        self._max_message_bytes = settings.worker.max_message_bytes
        self._retry_deadline_s = settings.worker.retry_deadline_s
        self._across_lanes = settings.redis.across_lanes
        self._first_seen = first_seen
        self._assignments = assignments
        self._windows = windows
        self._codec = codec
        self._counts = counts
        self._clock = clock
        self.configure(settings.active_lanes)

    def configure(self, lanes: Sequence[LaneSettings]) -> None:
        """Other settings of the same lanes, from the next micro-batch on."""
        self._lanes = {lane.name: lane for lane in lanes}

    async def prepare(self, records: list[Record]) -> MicroBatch:
        """Decodes, drops duplicates and fills windows.

        Raises TransientError when a Schema Registry stays away for ``retry_deadline_s``.
        """
        taken_us = self._now_us()
        owners = {one.partition: self._assignments[one.partition] for one in records}
        live, spans = self._start_spans(records, owners)
        items, letters = await retrying(
            "decode", lambda: self._decode(records, owners), self._retry_deadline_s
        )
        items = await self._drop_duplicates(items)
        return self._append(live, self._drop_abandoned(items), letters, spans, taken_us)

    def _now_us(self) -> int:
        return int(self._clock() * 1e6)

    def _start_spans(
        self, records: Sequence[Record], owners: Mapping[Partition, PartitionProgress]
    ) -> tuple[list[Record], list[tuple[PartitionProgress, Span]]]:
        now_s = time.monotonic()
        live: list[Record] = []
        ends: dict[Partition, int] = {}
        for record in records:
            counts = self._counts[record.lane]
            if record.offset >= owners[record.partition].live_from:
                counts.records += 1
                ends[record.partition] = record.offset + 1
                live.append(record)
            else:
                counts.replayed += 1
        started = [(owners[partition], end) for partition, end in ends.items()]
        return live, [(progress, progress.start(end, now_s)) for progress, end in started]

    async def _decode(
        self, records: Sequence[Record], owners: Mapping[Partition, PartitionProgress]
    ) -> tuple[list[Item], list[Letter]]:
        items: list[Item] = []
        letters: list[Letter] = []
        for record in records:
            progress = owners[record.partition]
            try:
                items.append(Item(record, progress, self._event(record)))
            except PoisonRecord as poison:
                if record.offset >= progress.live_from:
                    letters.append((record, poison))
        return items, letters

    def _event(self, record: Record) -> MarketEvent:
        max_bytes = self._max_message_bytes
        if record.value is not None and len(record.value) > max_bytes:
            raise PoisonRecord(
                "decode",
                "too_large",
                f"{len(record.value)} bytes; worker.max_message_bytes is {max_bytes}",
            )
        event = self._codec.decode_event(record.value, record.headers)
        self._windows.channels.check(event)
        return event

    async def _drop_duplicates(self, items: list[Item]) -> list[Item]:
        sources = [item.record.source for item in items]
        ids = [self._id(item) for item in items]
        first = await self._first_seen.sightings(ids, sources)
        fresh = []
        for item, event_id, source, first_source in zip(items, ids, sources, first, strict=True):
            owners = first_source.split("|")
            if source not in owners and (former := _replayed_from(item.record)):
                owners = (await self._first_seen.take_over(event_id, former, source)).split("|")
            if source in owners:
                fresh.append(item)
            elif item.is_live:
                self._counts[item.record.lane].duplicates += 1
        return fresh

    def _id(self, item: Item) -> str:
        event_id = item.event.event_id
        return event_id if self._across_lanes else f"{item.record.lane}:{event_id}"

    def _drop_abandoned(self, items: list[Item]) -> list[Item]:
        """Leaves out what belongs to a partition's next owner by now."""
        for item in items:
            if item.progress.closed and item.is_live:
                self._counts[item.record.lane].abandoned += 1
        return [item for item in items if not item.progress.closed]

    def _append(
        self,
        live: list[Record],
        items: list[Item],
        letters: list[Letter],
        spans: list[tuple[PartitionProgress, Span]],
        taken_us: int,
    ) -> MicroBatch:
        """Adds the events to their windows and takes out those that the model shall see."""
        lanes = [self._lanes[item.record.lane] for item in items]
        now_us = self._now_us()
        skipped = [
            lane.expired == "skip"
            and item.is_live
            and lane.is_late(item.record.appended_us, now_us)
            for item, lane in zip(items, lanes, strict=True)
        ]
        wanted = [
            item.is_live and not skip and _is_sampled(item.event, lane.stride)
            for item, lane, skip in zip(items, lanes, skipped, strict=True)
        ]
        appended = self._windows.append(
            [item.record.partition for item in items],
            [item.record.offset for item in items],
            [item.event for item in items],
            np.array(wanted, bool),
            np.array([int(lane.min_interval_ms * 1000) for lane in lanes], np.int64),
        )
        flags = appended.flags
        for row, (item, full, given) in enumerate(
            zip(items, appended.full, appended.given, strict=True)
        ):
            item.progress.appended = item.record.offset + 1
            if given:
                flags[row] |= _flag_of_skipped(item)
            elif not item.is_live:
                continue
            elif not full:
                self._counts[item.record.lane].warm_up += 1
            elif skipped[row]:
                self._counts[item.record.lane].skipped += 1
                item.progress.passed_over.add((item.event.venue, item.event.symbol))
            else:
                self._counts[item.record.lane].thinned += 1

        published: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        open_partitions = [one.partition for one, _ in spans if not one.closed]
        return MicroBatch(
            live=live,
            items=[item for item, given in zip(items, appended.given, strict=True) if given],
            flags=flags[appended.given],
            windows=appended.windows,
            letters=letters,
            taken_us=taken_us,
            given_us=self._now_us(),
            spans=spans,
            turns=self._assignments.line_up(open_partitions, published),
            published=published,
        )


def _is_sampled(event: MarketEvent, stride: int) -> bool:
    """One event in ``stride``, by a hash of its id: a replay chooses the same ones."""
    return stride == 1 or zlib.crc32(event.event_id.encode()) % stride == 0


def _flag_of_skipped(item: Item) -> Flags:
    """SKIPPED, once, if events of its symbol have been skipped since its last feature."""
    passed_over = item.progress.passed_over
    if not passed_over or (key := (item.event.venue, item.event.symbol)) not in passed_over:
        return Flags(0)
    passed_over.remove(key)
    return Flags.SKIPPED


def _replayed_from(record: Record) -> str | None:
    for name, value in record.headers:
        if name == REPLAYED_FROM_HEADER and value:
            return value.decode(errors="replace")
    return None
