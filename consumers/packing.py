"""What a micro-batch comes to: parcels of features and dead letters, one a partition."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from consumers.bisection import Row
from consumers.breaker import DeadLetterBreaker
from consumers.budget import BatchTimes
from consumers.envelopes import Envelopes
from consumers.intake import Letter, MicroBatch
from consumers.items import Items, lane_of
from consumers.metrics import LaneCounts
from consumers.parcels import Outgoing, Parcel
from consumers.records import Partition, Record
from consumers.tracing import BatchTrace, Tracing
from inference.client import Inference, ModelDescription
from schemas.codec import Codec
from schemas.errors import PoisonRecord
from schemas.lanes import LaneSettings
from schemas.messages import Flags
from schemas.settings import Settings


class _Together(NamedTuple):
    """Windows of one lane that one inference answered: where they are in the micro-batch and it."""

    lane: str
    inference: Inference
    indices: list[int]
    rows: list[int]


def _together(items: Items, rows: Sequence[Any], kept: list[int]) -> list[_Together]:
    """The windows that are kept, by lane and inference: nearly always it is one of each."""
    lanes = set(map(lane_of, items.records))
    if len(lanes) == 1 and len(kept) == len(rows) and len({id(one) for one, _ in rows}) == 1:
        return [_Together(lanes.pop(), rows[0][0], kept, [place for _, place in rows])]
    groups: dict[tuple[str, int], _Together] = {}
    for index in kept:
        lane, (inference, place) = items.records[index].lane, rows[index]
        group = groups.setdefault((lane, id(inference)), _Together(lane, inference, [], []))
        group.indices.append(index)
        group.rows.append(place)
    return list(groups.values())


class Packer:
    """Makes the parcels of one worker, and watches that dead letters are no flood."""

    def __init__(
        self,
        settings: Settings,
        codec: Codec,
        model: ModelDescription,
        counts: Mapping[str, LaneCounts],
        tracing: Tracing | None = None,
    ) -> None:
        self._tracing = tracing
        worker = settings.worker
        self._envelopes = Envelopes(
            codec, model.channels_version, model.score_names, says_timing=worker.timing_header
        )
        self._counts = counts
        self._breakers = {
            lane.name: DeadLetterBreaker(
                lane.name,
                max_ratio=worker.dlq_max_ratio,
                max_consecutive=worker.dlq_max_consecutive,
            )
            for lane in settings.active_lanes
        }
        self.configure(settings.active_lanes)

    def configure(self, lanes: Sequence[LaneSettings]) -> None:
        """Other settings of the same lanes, from the next micro-batch on."""
        self._lanes = {lane.name: lane for lane in lanes}
        self._lane_of = {lane.topic: lane for lane in lanes}

    def pack(
        self,
        batch: MicroBatch,
        rows: Sequence[Row | PoisonRecord],
        times: BatchTimes,
        model_version: str,
        now_us: int,
    ) -> list[Parcel]:
        """Features and dead letters; none for a partition that was taken away meanwhile.

        Args:
            model_version: the one that serves; a dead letter of the model's names it.

        Raises DeadLetterFlood.
        """
        parcels = {
            progress.partition: Parcel(self._lane_of[progress.partition[0]].name, progress, span)
            for progress, span in batch.spans
            if not progress.closed
        }
        letters = list(batch.letters)
        items, kept = batch.items, list(range(batch.items.num))
        if PoisonRecord in set(map(type, rows)) or any(one.closed for one in set(items.progress)):
            kept, failed = self._sort_out(items, rows)
            letters += failed
        made: list[tuple[int, Record, Outgoing]] = []
        with self._traced(items.num, times) as traced:
            together = _together(items, rows, kept)
            for group in together:
                made += self._features(group, batch, times, now_us, traced, parcels)
        if len(together) > 1:
            made.sort(key=itemgetter(0))
        partition: Partition | None = None
        for _, record, message in made:
            if record.partition is not partition:  # those of a partition come in runs
                partition = record.partition
                parcel = parcels[partition]
            parcel.features.append(record)
            parcel.messages.append(message)
        self._watch_for_flood(batch, letters)
        for letter in letters:
            self._pack_letter(parcels, letter, model_version, now_us)
        return list(parcels.values())

    def _sort_out(
        self, items: Items, rows: Sequence[Row | PoisonRecord]
    ) -> tuple[list[int], list[Letter]]:
        """The places of what becomes a feature, and what becomes a letter."""
        kept: list[int] = []
        letters: list[Letter] = []
        for index, row in enumerate(rows):
            if isinstance(row, PoisonRecord):
                letters.append((items.records[index], row))
            elif items.progress[index].closed:
                self._counts[items.records[index].lane].abandoned += 1
            else:
                kept.append(index)
        return kept, letters

    def _features(
        self,
        group: _Together,
        batch: MicroBatch,
        times: BatchTimes,
        now_us: int,
        traced: BatchTrace | None,
        parcels: Mapping[Partition, Parcel],
    ) -> Iterable[tuple[int, Record, Outgoing]]:
        """With the places of their records in the micro-batch."""
        lane, items = self._lanes[group.lane], batch.items
        if len(group.indices) < items.num:
            chosen = set(group.indices)
            items = items.those([index in chosen for index in range(items.num)])
        flags = batch.flags[group.indices]
        if group.inference.cached:
            flags |= np.uint8(Flags.CACHED)
        if lane.expired == "stale":
            flags |= lane.are_late(items.appended_us(), now_us) * np.uint8(Flags.STALE)
        traces = [traced.begin(record) for record in items.records] if traced else []
        for record, trace in zip(items.records, traces, strict=False):
            if trace:
                parcels[record.partition].traces.append(trace)
        made = self._envelopes.features(
            lane, items, group.inference, group.rows, flags, times, traces
        )
        return zip(group.indices, items.records, made, strict=True)

    def _traced(
        self, num_windows: int, times: BatchTimes
    ) -> AbstractContextManager[BatchTrace | None]:
        return self._tracing.batch(num_windows, times) if self._tracing else nullcontext()

    def _pack_letter(
        self,
        parcels: Mapping[Partition, Parcel],
        letter: Letter,
        model_version: str,
        now_us: int,
    ) -> None:
        record, poison = letter
        lane = self._lanes[record.lane]
        if (parcel := parcels.get(record.partition)) is None:
            self._counts[lane.name].abandoned += 1
            return
        parcel.letters.append(letter)
        parcel.messages.append(
            self._envelopes.dead_letter(lane, record, poison, now_us, model_version)
        )

    def _watch_for_flood(self, batch: MicroBatch, letters: Sequence[Letter]) -> None:
        if not letters:
            for lane, num in Counter(map(lane_of, batch.live)).items():
                self._breakers[lane].observe([False] * num)
            return
        poisoned = {(record.partition, record.offset) for record, _ in letters}
        ends: dict[str, list[bool]] = {}
        for record in batch.live:
            ends.setdefault(record.lane, []).append((record.partition, record.offset) in poisoned)
        for lane, are_letters in ends.items():
            self._breakers[lane].observe(are_letters)
