"""The partitions that a worker owns: how far each has come, and its windows."""

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import structlog

from consumers.offsets import PartitionProgress
from consumers.records import Assignment, CommitPoint, Partition
from consumers.windows import WindowStore

_log = structlog.get_logger(__name__)


class StalledHead(NamedTuple):
    """A partition whose oldest record in flight, at ``offset``, has been so for too long."""

    partition: Partition
    offset: int
    age_s: float

    def __str__(self) -> str:
        topic, number = self.partition
        return f"{topic} [{number}] at offset {self.offset} for {self.age_s:.0f} s"


class Assignments:
    """Owned partitions, each with its progress and its windows, from assignment to revocation.

    Also whose turn it is: a partition's micro-batches are published in the order in which they
    were prepared, whatever order the model answers in.
    """

    def __init__(self, windows: WindowStore) -> None:
        self._windows = windows
        self._progress: dict[Partition, PartitionProgress] = {}
        self._last_turns: dict[Partition, asyncio.Future[None]] = {}

    def __len__(self) -> int:
        return len(self._progress)

    def __iter__(self) -> Iterator[PartitionProgress]:
        return iter(list(self._progress.values()))

    def __contains__(self, partition: Partition) -> bool:
        return partition in self._progress

    def __getitem__(self, partition: Partition) -> PartitionProgress:
        return self._progress[partition]

    def of_each(self, partitions: Iterable[Partition]) -> list[PartitionProgress]:
        """The progress of each of some owned partitions, in their order."""
        return list(map(self._progress.__getitem__, partitions))

    def owned(self, partitions: Iterable[Partition]) -> list[PartitionProgress]:
        """The progress of those that are owned."""
        return [self._progress[one] for one in partitions if one in self._progress]

    def of_topic(self, topic: str) -> list[PartitionProgress]:
        """The progress of a lane's partitions."""
        return [one for one in self if one.partition[0] == topic]

    def take_on(self, assignments: Sequence[Assignment]) -> None:
        """Owns partitions from now on; their windows begin empty."""
        for assignment in assignments:
            self._windows.assign(assignment.partition)
            self._progress[assignment.partition] = PartitionProgress(assignment)

    def let_go(self, leaving: Iterable[PartitionProgress]) -> None:
        """Closes these: what of theirs is still in flight is void."""
        for progress in leaving:
            if progress.closed:
                continue
            progress.closed = True
            del self._progress[progress.partition]
            self._last_turns.pop(progress.partition, None)
            self._windows.revoke(progress.partition)

    def line_up(
        self, partitions: Sequence[Partition], published: asyncio.Future[None]
    ) -> list[asyncio.Future[None]]:
        """Puts a micro-batch behind the earlier ones of its partitions; returns those."""
        turns = [self._last_turns[one] for one in partitions if one in self._last_turns]
        self._last_turns.update(dict.fromkeys(partitions, published))
        return turns

    def checkpoint(self) -> None:
        """Notes for every partition from where a replay would give its windows as they are."""
        for progress in self._progress.values():
            if progress.is_past_checkpoint:
                position = progress.appended
                progress.checkpoint(self._windows.replay_offset(progress.partition, position))

    def commit_points(self) -> list[CommitPoint]:
        """What is new and may be committed."""
        return [point for one in self if (point := one.commit_point())]

    def stalled(self, now_s: float, after_s: float) -> tuple[StalledHead, ...]:
        """The partitions whose oldest record in flight has been so for longer than ``after_s``."""
        started = [(one, one.oldest_started_s) for one in self]
        return tuple(
            StalledHead(one.partition, one.committable, now_s - started_s)
            for one, started_s in started
            if started_s is not None and now_s - started_s > after_s
        )
