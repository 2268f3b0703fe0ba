"""What the next micro-batch holds: records by rank, every lane's reserved share first. Sans-IO."""

from collections import deque
from collections.abc import Iterable, Sequence

from consumers.records import Partition, Record
from schemas.settings import LaneSettings


class LaneScheduler:
    """The queues of all lanes, and the rule by which a micro-batch is filled from them.

    A lane that wants its reserved share of a batch gets it; what is left goes to the first rank
    that wants it. Work-conserving: a batch is as full as the queues allow.
    """

    def __init__(self, lanes: Sequence[LaneSettings]) -> None:
        self._lanes = sorted(lanes, key=lambda lane: lane.rank)
        self._queues: dict[str, deque[Record]] = {lane.name: deque() for lane in lanes}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def num_queued(self, lane: str) -> int:
        """Records waiting in a lane."""
        return len(self._queues[lane])

    def put(self, lane: str, records: Iterable[Record]) -> None:
        """Adds records behind the lane's others."""
        self._queues[lane].extend(records)

    def take(self, max_records: int) -> list[Record]:
        """Removes and returns the next micro-batch's records; in each lane oldest first."""
        waiting = {lane.name: len(self._queues[lane.name]) for lane in self._lanes}
        taken = {
            lane.name: min(waiting[lane.name], int(lane.reserved_share * max_records))
            for lane in self._lanes
        }
        free = max_records - sum(taken.values())
        for name, queued in waiting.items():
            more = min(queued - taken[name], free)
            taken[name] += more
            free -= more
        return [self._queues[name].popleft() for name, num in taken.items() for _ in range(num)]

    def drop(self, partition: Partition) -> int:
        """Forgets the queued records of a partition; returns how many."""
        before = len(self)
        for lane, queue in self._queues.items():
            self._queues[lane] = deque(one for one in queue if one.partition != partition)
        return before - len(self)
