"""The fold of letters and receipts: which letters there are, and what became of each."""

from array import array
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from tapeline.dlq.letters import (
    Closed,
    Group,
    Letter,
    LetterId,
    Receipt,
    Record,
    Selection,
    State,
    Unreadable,
)

Place = tuple[str, int]
"""Lane and partition of its DLQ topic."""


class IndexEntry(NamedTuple):
    """A letter, or an unreadable record, as the index remembers it."""

    id: LetterId
    failed_at_us: int
    group: Group
    state: State


class LeadingRun(NamedTuple):
    """The beginning of a partition that holds nothing open.

    Attributes:
        before: the offset of the first record that must stay.
        num_records: letters and receipts before it.
    """

    before: int
    num_records: int


class _Partition:
    """24 bytes a letter, and some 100 for each that is closed."""

    def __init__(self) -> None:
        self.offsets = array("q")
        self.failed_at_us = array("q")
        self.groups = array("q")  # numbers of groups
        self.receipts = array("q")  # offsets of receipts
        self.unreadable: set[int] = set()
        self.closed: dict[int, Closed] = {}

    def state(self, offset: int) -> State:
        default: State = "unreadable" if offset in self.unreadable else "open"
        return self.closed.get(offset, default)


class Index:
    """Letters with their states, without what they hold. Made by ``fold``.

    Invariant: a letter is open if and only if no receipt names it. Receipts are never taken back,
    so a closed letter stays closed; ``purged`` outlasts ``replayed``.
    """

    def __init__(self) -> None:
        self._partitions: defaultdict[Place, _Partition] = defaultdict(_Partition)
        self._group_numbers: dict[Group, int] = {}

    def add(self, record: Letter | Unreadable) -> None:
        lane, number, offset = record.id
        partition = self._partitions[lane, number]
        partition.offsets.append(offset)
        partition.failed_at_us.append(record.failed_at_us)
        group = self._group_numbers.setdefault(record.group, len(self._group_numbers))
        partition.groups.append(group)
        if isinstance(record, Unreadable):
            partition.unreadable.add(offset)

    def close(self, receipt: Receipt) -> None:
        lane, number, offset = receipt.id
        partition = self._partitions[lane, number]
        partition.receipts.append(offset)
        if partition.closed.get(receipt.letter_offset) != "purged":
            partition.closed[receipt.letter_offset] = receipt.state

    def __iter__(self) -> Iterator[IndexEntry]:
        """By lane and partition; in each as they were added, which is by offset."""
        groups = list(self._group_numbers)
        for (lane, number), partition in sorted(self._partitions.items()):
            columns = (partition.offsets, partition.failed_at_us, partition.groups)
            for offset, failed_at_us, group in zip(*columns, strict=True):
                id = LetterId(lane, number, offset)
                yield IndexEntry(id, failed_at_us, groups[group], partition.state(offset))

    def ids(self, *states: State) -> list[LetterId]:
        """The letters in one of these states."""
        return [entry.id for entry in self if entry.state in states]

    def counts(self) -> dict[Group, Counter[State]]:
        """How many letters of each cause are in each state."""
        counts: defaultdict[Group, Counter[State]] = defaultdict(Counter)
        for entry in self:
            counts[entry.group][entry.state] += 1
        return dict(sorted(counts.items()))

    def leading_run(
        self, place: Place, end: int, closing: Collection[LetterId] = frozenset()
    ) -> LeadingRun:
        """How far a partition may be cut off, as if those of ``closing`` were closed too.

        Right only for an index of everything that the partition holds up to ``end``. What is
        cut off holds no receipt of a letter that stays: a receipt follows its letter.
        """
        partition = self._partitions[place]
        staying = (
            offset
            for offset in partition.offsets
            if offset not in partition.closed and LetterId(*place, offset) not in closing
        )
        before = min(staying, default=end)
        cut = [
            bisect_left(sorted(part), before) for part in (partition.offsets, partition.receipts)
        ]
        return LeadingRun(before, sum(cut))


EVERYTHING = Selection()


def fold(records: Iterable[Record], selection: Selection = EVERYTHING) -> Index:
    """The index of what the selection holds; the same whatever the order of ``records``."""
    index = Index()
    for record in records:
        if isinstance(record, Receipt):
            index.close(record)
        elif selection.holds(record):
            index.add(record)
    return index
