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

from consumers.channels import Bools, ChannelSet, Ints
from consumers.columns import NO_SEQUENCE, EventColumns, an_event
from consumers.compiled import compiled
from consumers.records import Partition
from schemas.messages import Flags
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
_GAP, _OUT_OF_ORDER = int(Flags.GAP), int(Flags.OUT_OF_ORDER)


_NOBODYS: Partition = ("", -1)


class WindowStore:
    """The windows of every symbol of every assigned partition.

    State belongs to (topic, partition, venue, symbol). Bounded: ``max_symbols`` a partition, the
    longest unseen leaves first. Compiles its code when it is made.

    Invariant: ``values[slot]`` is a ring of steps, ``end`` the place of its symbol's next row.
    """

    def __init__(self, channels: ChannelSet, settings: WindowSettings) -> None:
        self.channels = channels
        self._steps = settings.num_steps
        self._limits = np.array(
            [settings.num_steps, int(settings.max_gap_s * 1e6), settings.max_idle_records], np.int64
        )
        self._max_idle_records = settings.max_idle_records
        self._max_symbols = settings.max_symbols
        self._slots: dict[Partition, OrderedDict[bytes, int]] = {}
        self._free: list[int] = []
        self._ends = np.zeros(0, np.int64)
        self._symbols = np.zeros(0, _SYMBOL)
        self._states = np.zeros(0, channels.state)
        self._values = np.zeros((0, channels.num_channels, self._steps), np.float32)
        self._floors = np.zeros((0, self._steps), np.int64)
        self._evicted_total = 0
        self._emptied_total = 0
        none = np.zeros(0, bool)
        self._nothing = Appended(none, none, self._empty_windows(0), np.zeros(0, np.uint8))
        self._compile()

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
        events: EventColumns,
        wanted: Bools,
        min_intervals_us: Ints,
    ) -> Appended:
        """Adds one row an event; per partition, offsets rise.

        Args:
            wanted: bool, (n,): whose windows to hand out, if they are full.
            min_intervals_us: int64, (n,): above 0, only the first event of a symbol in each
                interval of event time is wanted, intervals counted from the epoch.
        """
        num = len(events)
        if not num:
            return self._nothing
        slots, fresh = self._find_slots(partitions, events.symbols)
        at = np.fromiter(offsets, np.int64, num)
        emptied, full, given = np.empty(num, bool), np.empty(num, bool), np.empty(num, bool)
        flags = np.empty(num, np.uint8)
        _advance(
            slots,
            fresh,
            at,
            events.times_us,
            events.sequences,
            wanted,
            min_intervals_us,
            self._symbols,
            self._limits,
            emptied,
            full,
            given,
            flags,
        )
        rows, floors = self.channels.rows(events, at, slots, emptied, self._states)
        windows = self._empty_windows(int(np.count_nonzero(given)))
        _write(slots, rows, floors, given, self._ends, self._values, self._floors, windows)
        self._emptied_total += int(np.count_nonzero(emptied) - np.count_nonzero(fresh))
        return Appended(full, given, windows, flags)

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
        oldest = (self._ends[slots] - num_rows) % self._steps
        return int(self._floors[slots, oldest].min())

    def statistics(self) -> WindowStatistics:
        """A snapshot of sizes and counts."""
        arrays = (self._values, self._floors, self._symbols, self._states, self._ends)
        return WindowStatistics(
            num_symbols=sum(len(slots) for slots in self._slots.values()),
            evicted_total=self._evicted_total,
            emptied_total=self._emptied_total,
            allocated_bytes=sum(array.nbytes for array in arrays),
        )

    def _compile(self) -> None:
        """Has the code made now and not with the first event."""
        self.assign(_NOBODYS)
        self.append([_NOBODYS], [0], an_event(), np.ones(1, bool), np.zeros(1, np.int64))
        self.revoke(_NOBODYS)

    def _find_slots(
        self, partitions: Sequence[Partition], symbols: Sequence[bytes]
    ) -> tuple[Ints, Bools]:
        """The slot of each event's symbol, and whether the symbol is new to it."""
        slots: list[int] = []
        fresh = np.zeros(len(symbols), bool)
        for partition, symbol in zip(partitions, symbols, strict=True):
            of_partition = self._slots[partition]
            slot = of_partition.get(symbol)
            if slot is None:
                fresh[len(slots)] = True
                slot = of_partition[symbol] = self._free_slot(of_partition)
            else:
                of_partition.move_to_end(symbol)
            slots.append(slot)
        return np.array(slots, np.int64), fresh

    def _free_slot(self, of_partition: OrderedDict[bytes, int]) -> int:
        if len(of_partition) == self._max_symbols:
            _, leaving = of_partition.popitem(last=False)
            self._free.append(leaving)
            self._evicted_total += 1
        if not self._free:
            self._grow()
        return self._free.pop()

    def _empty_windows(self, num_windows: int) -> NDArray[np.float32]:
        return np.empty((num_windows, self.channels.num_channels, self._steps), np.float32)

    def _grow(self) -> None:
        """Doubles the slots, from 64 on. The new ones take no memory before they are used."""
        old = len(self._ends)
        added = max(64, old)
        self._symbols = _longer(self._symbols, added)
        self._states = _longer(self._states, added)
        self._values = _longer(self._values, added)
        self._floors = _longer(self._floors, added)
        self._ends = _longer(self._ends, added)
        self._free += range(old + added - 1, old - 1, -1)


def _longer(array: NDArray[T], added: int) -> NDArray[T]:
    longer = np.zeros((len(array) + added, *array.shape[1:]), array.dtype)
    longer[: len(array)] = array
    return longer


@compiled
def _advance(
    slots: Ints,
    fresh: Bools,
    offsets: Ints,
    times_us: Ints,
    sequences: Ints,
    wanted: Bools,
    min_intervals_us: Ints,
    symbols: NDArray[np.void],
    limits: Ints,
    emptied: Bools,
    full: Bools,
    given: Bools,
    flags: NDArray[np.uint8],
) -> None:
    """Applies the rules to each event against the one of its symbol before it."""
    num_steps, max_gap_us, max_idle_records = limits
    for index in range(len(slots)):
        symbol = symbols[slots[index]]
        time_us, sequence = times_us[index], sequences[index]
        emptied[index] = (
            fresh[index]
            or time_us - symbol.time_us > max_gap_us
            or offsets[index] - symbol.offset > max_idle_records
        )
        # Intervals are counted from the epoch, a rule without memory: a replay takes the same.
        length_us = max(min_intervals_us[index], 1)
        starts = (
            emptied[index]
            or not min_intervals_us[index]
            or time_us // length_us != symbol.time_us // length_us
        )
        flags[index] = 0
        if not emptied[index]:
            is_numbered = symbol.sequence != NO_SEQUENCE and sequence != NO_SEQUENCE
            if is_numbered and sequence > symbol.sequence + 1:
                flags[index] |= _GAP
            if (is_numbered and sequence <= symbol.sequence) or time_us < symbol.time_us:
                flags[index] |= _OUT_OF_ORDER
        symbol.num_rows = 1 if emptied[index] else min(symbol.num_rows + 1, num_steps)
        symbol.time_us, symbol.offset, symbol.sequence = time_us, offsets[index], sequence
        full[index] = symbol.num_rows == num_steps
        given[index] = full[index] and wanted[index] and starts


@compiled
def _write(
    slots: Ints,
    rows: NDArray[np.float32],
    floors: Ints,
    given: Bools,
    ends: Ints,
    values: NDArray[np.float32],
    all_floors: Ints,
    windows: NDArray[np.float32],
) -> None:
    """Adds the rows, and copies the windows that are given."""
    num_channels, num_steps = values.shape[1], values.shape[2]
    place = 0
    for index in range(len(slots)):
        slot = slots[index]
        end = ends[slot]
        ring = values[slot]
        for channel in range(num_channels):
            ring[channel, end] = rows[index, channel]
        all_floors[slot, end] = floors[index]
        begin = end + 1 if end + 1 < num_steps else 0
        ends[slot] = begin
        if given[index]:
            window, num_older = windows[place], num_steps - begin
            place += 1
            for channel in range(num_channels):
                for step in range(num_older):
                    window[channel, step] = ring[channel, begin + step]
                for step in range(begin):
                    window[channel, num_older + step] = ring[channel, step]
