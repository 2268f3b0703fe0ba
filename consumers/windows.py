"""Rolling windows: the newest rows of every symbol, and how far back a replay of them begins.

Sans-IO. What an event's window holds is a function of the records of its partition alone: not of
batches, clocks or restarts. Every rule that empties a window looks at nothing but the symbol's own
last event (its time, its offset) and the symbols seen since, so that a replay from
``replay_offset`` empties the same windows at the same records.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from consumers.channels import Bools, ChannelSet, Ints, Segments
from consumers.records import Partition
from schemas.messages import Flags, MarketEvent
from schemas.settings import WindowSettings

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True, eq=False)
class Appended:
    """What became of ``n`` appended events, in the order they were given.

    Attributes:
        full: bool, (n,): the event's window is full; else it is still warming up.
        given: bool, (n,): its window is handed out; at most what was wanted.
        windows: float32, (k, C, T), oldest step first: one per given event.
        flags: per event, GAP and OUT_OF_ORDER as they apply.
    """

    full: Bools
    given: Bools
    windows: NDArray[np.float32]
    flags: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class WindowStatistics:
    """A snapshot of a WindowStore."""

    num_symbols: int
    evicted_total: int
    emptied_total: int
    allocated_bytes: int


_SYMBOL = np.dtype(
    [
        ("time_us", "i8"),
        ("offset", "i8"),
        ("sequence", "i8"),
        ("num_rows", "i8"),
    ]
)
_NO_SEQUENCE = -1


class WindowStore:
    """The windows of every symbol of every assigned partition.

    State belongs to (topic, partition, venue, symbol). Bounded: ``max_symbols`` a partition, the
    longest unseen leaves first.

    Invariant: a slot's rows are columns ``end - num_rows`` to ``end`` of ``values[slot]``, which
    has a few spare columns so that a row is written once and moved rarely.
    """

    def __init__(self, channels: ChannelSet, settings: WindowSettings) -> None:
        self.channels = channels
        self._steps = settings.num_steps
        self._width = settings.num_steps + max(4, settings.num_steps // 5)
        self._max_gap_us = int(settings.max_gap_s * 1e6)
        self._max_idle_records = settings.max_idle_records
        self._max_symbols = settings.max_symbols
        self._slots: dict[Partition, OrderedDict[tuple[str, str], int]] = {}
        self._free: list[int] = []
        self._ends: list[int] = []
        self._symbols = np.zeros(0, _SYMBOL)
        self._states = np.zeros(0, channels.state)
        self._values = np.zeros((0, channels.num_channels, self._width), np.float32)
        self._floors = np.zeros((0, self._width), np.int64)
        self._evicted_total = 0
        self._emptied_total = 0
        none = np.zeros(0, bool)
        self._nothing = Appended(none, none, self._empty_windows(0), np.zeros(0, np.uint8))

    def assign(self, partition: Partition) -> None:
        """Makes room for a partition; its windows begin empty."""
        assert partition not in self._slots
        self._slots[partition] = OrderedDict()

    def revoke(self, partition: Partition) -> None:
        """Forgets a partition's windows."""
        self._free += self._slots.pop(partition).values()

    def append(
        self,
        partitions: Sequence[Partition],
        offsets: Sequence[int],
        events: Sequence[MarketEvent],
        wanted: Bools,
        min_intervals_us: Ints,
    ) -> Appended:
        """Adds one row an event; per partition, offsets rise.

        Args:
            wanted: bool, (n,): whose windows to hand out, if they are full.
            min_intervals_us: int64, (n,): above 0, only the first event of a symbol in each
                interval of event time is wanted, intervals counted from the epoch.
        """
        if not events:
            return self._nothing
        slots, seen_before = self._find_slots(partitions, events)
        order = np.argsort(slots, kind="stable")
        slots, ordered = slots[order], [events[index] for index in order]
        newest = np.zeros(len(events), _SYMBOL)
        newest["time_us"] = [event.event_time_us for event in ordered]
        newest["offset"] = np.array(offsets, np.int64)[order]
        newest["sequence"] = [
            _NO_SEQUENCE if event.sequence is None else event.sequence for event in ordered
        ]
        by_slot = Segments.starting(np.append(True, slots[1:] != slots[:-1]))
        before = by_slot.previous(newest, self._symbols[slots[by_slot.first]])
        emptied = ~seen_before[order] | self._is_void(before, newest)
        runs = self._runs(slots, by_slot, emptied)

        rows, floors, states = self.channels.rows(
            ordered,
            newest["offset"],
            newest["time_us"],
            runs,
            self._carried(slots[runs.first], emptied[runs.first]),
        )
        position = np.arange(len(order)) - runs.first[runs.of]
        carried_rows = np.where(emptied, 0, self._symbols["num_rows"][slots])[runs.first]
        newest["num_rows"] = np.minimum(carried_rows[runs.of] + position + 1, self._steps)

        full = _unsort(newest["num_rows"] == self._steps, order)
        starts = emptied | _starts_interval(before, newest, min_intervals_us[order])
        given = full & wanted & _unsort(starts, order)
        windows = self._write(slots, rows, floors, np.where(given, np.cumsum(given) - 1, -1)[order])
        self._symbols[slots[by_slot.last]] = newest[by_slot.last]
        self._states[slots[by_slot.last]] = states[runs.of[by_slot.last]]
        self._emptied_total += int(emptied.sum() - (~seen_before).sum())
        flags = np.where(emptied, 0, _flags(before, newest)).astype(np.uint8)
        return Appended(full, given, windows, _unsort(flags, order))

    def replay_offset(self, partition: Partition, position: int) -> int:
        """The offset from which a replay rebuilds this partition's windows, bit for bit.

        Never falls. ``position`` is the next offset to be appended, and the answer if no window
        of the partition can still grow.
        """
        slots = np.fromiter(self._slots[partition].values(), np.int64)
        symbols = self._symbols[slots]
        alive = position - symbols["offset"] <= self._max_idle_records
        slots, num_rows = slots[alive], symbols["num_rows"][alive]
        if not len(slots):
            return position
        oldest = np.array([self._ends[slot] for slot in slots]) - num_rows
        return int(self._floors[slots, oldest].min())

    def statistics(self) -> WindowStatistics:
        """A snapshot of sizes and counts."""
        arrays = (self._values, self._floors, self._symbols, self._states)
        return WindowStatistics(
            num_symbols=sum(len(slots) for slots in self._slots.values()),
            evicted_total=self._evicted_total,
            emptied_total=self._emptied_total,
            allocated_bytes=sum(array.nbytes for array in arrays),
        )

    def _find_slots(
        self, partitions: Sequence[Partition], events: Sequence[MarketEvent]
    ) -> tuple[Ints, Bools]:
        """The slot of each event's symbol, and whether the symbol had one before."""
        slots = np.empty(len(events), np.int64)
        seen_before = np.ones(len(events), bool)
        for index, (partition, event) in enumerate(zip(partitions, events, strict=True)):
            of_partition = self._slots[partition]
            key = (event.venue, event.symbol)
            slot = of_partition.get(key)
            if slot is None:
                if len(of_partition) == self._max_symbols:
                    _, leaving = of_partition.popitem(last=False)
                    self._free.append(leaving)
                    self._evicted_total += 1
                if not self._free:
                    self._grow()
                slot = of_partition[key] = self._free.pop()
                seen_before[index] = False
            else:
                of_partition.move_to_end(key)
            slots[index] = slot
        return slots, seen_before

    def _is_void(self, before: NDArray[np.void], newest: NDArray[np.void]) -> Bools:
        """Whether so much lies between two events of a symbol that its window begins anew."""
        gap: Bools = newest["time_us"] - before["time_us"] > self._max_gap_us
        idle: Bools = newest["offset"] - before["offset"] > self._max_idle_records
        return gap | idle

    def _runs(self, slots: Ints, by_slot: Segments, emptied: Bools) -> Segments:
        starts = emptied.copy()
        starts[by_slot.first] = True
        return Segments.starting(starts)

    def _carried(self, slots: Ints, emptied: Bools) -> NDArray[np.void]:
        states = self._states[slots]
        states[emptied] = self.channels.empty()
        return states

    def _write(
        self, slots: Ints, rows: NDArray[np.float32], floors: Ints, places: Ints
    ) -> NDArray[np.float32]:
        """Adds the rows and copies the windows asked for to their places (-1: not asked)."""
        windows = self._empty_windows(int((places >= 0).sum()))
        ends, steps = self._ends, self._steps
        for slot, row, floor, place in zip(
            slots.tolist(), rows, floors.tolist(), places.tolist(), strict=True
        ):
            values, slot_floors, end = self._values[slot], self._floors[slot], ends[slot]
            if end == self._width:
                values[:, : steps - 1] = values[:, end - steps + 1 :]
                slot_floors[: steps - 1] = slot_floors[end - steps + 1 :]
                end = steps - 1
            values[:, end] = row
            slot_floors[end] = floor
            ends[slot] = end = end + 1
            if place >= 0:
                windows[place] = values[:, end - steps : end]
        return windows

    def _empty_windows(self, num_windows: int) -> NDArray[np.float32]:
        return np.empty((num_windows, self.channels.num_channels, self._steps), np.float32)

    def _grow(self) -> None:
        """Doubles the slots, from 64 on."""
        old = len(self._ends)
        added = max(64, old)
        self._symbols = np.concatenate([self._symbols, np.zeros(added, _SYMBOL)])
        self._states = np.concatenate([self._states, np.zeros(added, self._states.dtype)])
        self._values = _longer(self._values, added)
        self._floors = _longer(self._floors, added)
        self._ends += [0] * added
        self._free += range(old + added - 1, old - 1, -1)


def _longer(array: NDArray[T], added: int) -> NDArray[T]:
    return np.concatenate([array, np.zeros((added, *array.shape[1:]), array.dtype)])


def _unsort(values: NDArray[T], order: Ints) -> NDArray[T]:
    restored = np.empty_like(values)
    restored[order] = values
    return restored


def _starts_interval(
    before: NDArray[np.void], newest: NDArray[np.void], intervals_us: Ints
) -> Bools:
    """Whether an event is its symbol's first in an interval; always, where there is none.

    A rule without memory, so that a replay chooses the same events.
    """
    length = np.maximum(intervals_us, 1)
    starts: Bools = newest["time_us"] // length != before["time_us"] // length
    starts |= intervals_us == 0
    return starts


def _flags(before: NDArray[np.void], newest: NDArray[np.void]) -> NDArray[np.uint8]:
    """GAP and OUT_OF_ORDER of each event against the one before it."""
    numbered = (before["sequence"] != _NO_SEQUENCE) & (newest["sequence"] != _NO_SEQUENCE)
    steps = newest["sequence"] - before["sequence"]
    late = (numbered & (steps <= 0)) | (newest["time_us"] < before["time_us"])
    gap = numbered & (steps > 1)
    flags: NDArray[np.uint8] = gap * np.uint8(Flags.GAP) | late * np.uint8(Flags.OUT_OF_ORDER)
    return flags
