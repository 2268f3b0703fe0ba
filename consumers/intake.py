"""The way in: records become events, lose their duplicates, and fill windows."""

import asyncio
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from consumers.assignments import Assignments
from consumers.columns import EventDecoder
from consumers.dedup import FirstSeen
from consumers.envelopes import REPLAYED_FROM_HEADER
from consumers.items import (
    Items,
    headers_of,
    lane_of,
    offset_of,
    partition_of,
    value_of,
)
from consumers.metrics import LaneCounts
from consumers.offsets import PartitionProgress, Span
from consumers.records import Record
from consumers.retry import retrying
from consumers.windows import WindowStore
from schemas.codec import Codec
from schemas.errors import PoisonRecord
from schemas.lanes import LaneSettings
from schemas.messages import Flags
from schemas.settings import Settings

Letter = tuple[Record, PoisonRecord]


@dataclass(slots=True, eq=False)
class MicroBatch:
    """Records that go to the model together, and what is owed for them.

    Attributes:
        live: the records that are owed an end, in the order of their offsets per partition.
        items, flags: one of each per window.
        windows: float32, (B, C, T).
        letters: poison records and why.
        taken_us, given_us: when its records left their queues, and when it was ready for the model.
        spans: what these records keep from being committed.
        turns: done when the earlier micro-batches of the same partitions are on their way out.
        published: done when this one is.
    """

    live: list[Record]
    items: Items
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
        self._retry_deadline_s = settings.worker.retry_deadline_s
        self._across_lanes = settings.redis.across_lanes
        self._first_seen = first_seen
        self._assignments = assignments
        self._windows = windows
        max_bytes = settings.worker.max_message_bytes
        self._decoder = EventDecoder(codec, windows.channels.check, max_bytes)
        self._counts = counts
        self._clock = clock
        self.configure(settings.active_lanes)

    def configure(self, lanes: Sequence[LaneSettings]) -> None:
        """Other settings of the same lanes, from the next micro-batch on."""
        self._lanes = {lane.name: lane for lane in lanes}
        self._any_skips = any(lane.expired == "skip" for lane in lanes)
        self._are_thinned = self._any_skips or any(
            lane.stride > 1 or lane.min_interval_ms for lane in lanes
        )

    async def prepare(self, records: list[Record]) -> MicroBatch:
        """Decodes, drops duplicates and fills windows.

        Raises TransientError when a Schema Registry stays away for ``retry_deadline_s``.
        """
        taken_us = self._now_us()
        progress = self._assignments.of_each(map(partition_of, records))
        live, spans = self._start_spans(records, progress)
        decoded, letters = await retrying(
            "decode", lambda: self._decode(records, progress), self._retry_deadline_s
        )
        fresh = await self._drop_duplicates(decoded)
        return self._append(live, self._drop_abandoned(fresh), letters, spans, taken_us)

    def _now_us(self) -> int:
        return int(self._clock() * 1e6)

    def _start_spans(
        self, records: list[Record], progress: Sequence[PartitionProgress]
    ) -> tuple[list[Record], list[tuple[PartitionProgress, Span]]]:
        now_s = time.monotonic()
        live = records
        if not all(owner.is_live for owner in set(progress)):
            pairs = zip(records, progress, strict=True)
            live = [record for record, owner in pairs if record.offset >= owner.live_from]
        for lane, num in Counter(map(lane_of, live)).items():
            self._counts[lane].records += num
        if len(live) < len(records):
            for lane, num in (Counter(map(lane_of, records)) - Counter(map(lane_of, live))).items():
                self._counts[lane].replayed += num
        owners = dict(zip(map(partition_of, records), progress, strict=True))
        ends = {record.partition: record.offset + 1 for record in live}
        return live, [(owners[one], owners[one].start(end, now_s)) for one, end in ends.items()]

    async def _decode(
        self, records: list[Record], progress: list[PartitionProgress]
    ) -> tuple[Items, list[Letter]]:
        events, poison = self._decoder.decode(
            list(map(value_of, records)), list(map(headers_of, records))
        )
        if not poison:
            return Items(records, progress, events), []
        good = [row not in poison for row in range(len(records))]
        letters = [
            (records[row], why)
            for row, why in poison.items()
            if records[row].offset >= progress[row].live_from
        ]
        return Items(list(compress(records, good)), list(compress(progress, good)), events), letters

    async def _drop_duplicates(self, decoded: Items) -> Items:
        records = decoded.records
        partitions = list(map(partition_of, records))
        named = {(topic, number): f"{topic}:{number}:" for topic, number in set(partitions)}
        places = zip(partitions, map(offset_of, records), strict=True)
        sources = [named[partition] + str(offset) for partition, offset in places]
        ids = decoded.events.ids
        if not self._across_lanes:
            ids = [f"{record.lane}:{one}" for record, one in zip(records, ids, strict=True)]
        first = await self._first_seen.sightings(ids, sources)
        if first == sources:
            return decoded
        fresh = []
        for row, (source, first_source) in enumerate(zip(sources, first, strict=True)):
            owners = first_source.split("|")
            if source not in owners and (former := _replayed_from(records[row])):
                owners = (await self._first_seen.take_over(ids[row], former, source)).split("|")
            fresh.append(source in owners)
            if not fresh[row] and records[row].offset >= decoded.progress[row].live_from:
                self._counts[records[row].lane].duplicates += 1
        return decoded.those(fresh)

    def _drop_abandoned(self, decoded: Items) -> Items:
        """Leaves out what belongs to a partition's next owner by now."""
        if not any(one.closed for one in set(decoded.progress)):
            return decoded
        for record, progress in zip(decoded.records, decoded.progress, strict=True):
            if progress.closed and record.offset >= progress.live_from:
                self._counts[record.lane].abandoned += 1
        return decoded.those([not one.closed for one in decoded.progress])

    def _append(
        self,
        live: list[Record],
        decoded: Items,
        letters: list[Letter],
        spans: list[tuple[PartitionProgress, Span]],
        taken_us: int,
    ) -> MicroBatch:
        """Adds the events to their windows and takes out those that the model shall see."""
        records, owners, events = decoded
        are_live = decoded.are_live()
        skipped = self._skipped(records, are_live)
        intervals_us = np.zeros(len(records), np.int64)
        wanted = are_live
        if self._are_thinned:
            lanes = [self._lanes[record.lane] for record in records]
            intervals_us[:] = [int(lane.min_interval_ms * 1000) for lane in lanes]
            wanted = [
                one and row not in skipped and _is_sampled(event_id, lane.stride)
                for row, (one, event_id, lane) in enumerate(
                    zip(are_live, events.ids, lanes, strict=True)
                )
            ]
        appended = self._windows.append(
            list(map(partition_of, records)),
            list(map(offset_of, records)),
            events,
            np.array(wanted, bool),
            intervals_us,
        )
        for progress, record in dict(zip(owners, records, strict=True)).items():
            progress.appended = record.offset + 1
        for row in np.flatnonzero(~appended.given).tolist():
            counts = self._counts[records[row].lane]
            if not are_live[row]:
                continue
            if not appended.full[row]:
                counts.warm_up += 1
            elif row in skipped:
                counts.skipped += 1
                owners[row].passed_over.add(events.symbols[row])
            else:
                counts.thinned += 1
        items = decoded.those(appended.given.tolist())
        flags = appended.flags[appended.given]
        if any(one.passed_over for one in set(owners)):
            flags |= _flags_of_skipped(items)

        published: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        open_partitions = [one.partition for one, _ in spans if not one.closed]
        return MicroBatch(
            live=live,
            items=items,
            flags=flags,
            windows=appended.windows,
            letters=letters,
            taken_us=taken_us,
            given_us=self._now_us(),
            spans=spans,
            turns=self._assignments.line_up(open_partitions, published),
            published=published,
        )

    def _skipped(self, records: Sequence[Record], are_live: Sequence[bool]) -> set[int]:
        """Which are past their deadline, in lanes that make no features of such."""
        now_us = self._now_us()
        return {
            row
            for row, record in enumerate(records if self._any_skips else ())
            if are_live[row]
            and (lane := self._lanes[record.lane]).expired == "skip"
            and lane.is_late(record.appended_us, now_us)
        }


def _is_sampled(event_id: str, stride: int) -> bool:
    """One event in ``stride``, by a hash of its id: a replay chooses the same ones."""
    return stride == 1 or zlib.crc32(event_id.encode()) % stride == 0


def _flags_of_skipped(items: Items) -> NDArray[np.uint8]:
    """SKIPPED, once, where events of the symbol have been skipped since its last feature."""
    flags = np.zeros(items.num, np.uint8)
    for row, (progress, symbol) in enumerate(
        zip(items.progress, items.events.symbols, strict=True)
    ):
        if symbol in progress.passed_over:
            progress.passed_over.remove(symbol)
            flags[row] = Flags.SKIPPED
    return flags


def _replayed_from(record: Record) -> str | None:
    for name, value in record.headers:
        if name == REPLAYED_FROM_HEADER and value:
            return value.decode(errors="replace")
    return None
