"""What the next micro-batch holds: how many records, and of which lanes. Sans-IO.

How many: all that waits in the lane of the shortest deadline; with others' records no more than the
model is expected to get done within a share of that deadline, and in time for the tightest deadline
aboard. Of which lanes: each one's reserved share first, the rest to the first rank that wants it.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from consumers.records import Partition, Record
from consumers.service_times import SMALLEST_BUCKET, ServiceTimes, bucket_of
from schemas.lanes import LaneSettings

_AWAKE_US = 1_000_000
_FLAT = 1.1  # a bucket that takes so little longer than a smaller one rides for free


@dataclass(slots=True, eq=False)
class _Lane:
    """A lane's queue and its credit: records that it may still have of its reserved share.

    Attributes:
        newest_us: when its newest record was appended; Unix epoch.
        taken: records it was given, in all.
    """

    settings: LaneSettings
    queue: deque[Record]
    credit: float = 0.0
    newest_us: int = 0
    taken: int = 0

    def wants(self) -> int:
        limit = self.settings.max_batch
        return len(self.queue) if limit is None else min(len(self.queue), limit)

    def is_awake(self, now_us: int) -> bool:
        return bool(self.queue) or now_us - self.newest_us < _AWAKE_US


class LaneScheduler:
    """The queues of all lanes, and the rules by which micro-batches are filled from them.

    A lane earns its reserved share of every micro-batch as credit, and may save up to its share of
    one of ``max_batch``: so even 3 % of small batches come to 3 %, and a burst within a lane's
    rights waits for nobody. What a lane takes of unused shares costs it no credit.

    Work-conserving: a call takes something whenever something waits, and no lane starves. Of ``n``
    lanes one of share ``s > 0`` gets the record at place ``p`` of its queue (the first is 0) out
    within ``(p + 2 + max_batch + n * n) / s + max_batch`` records: higher ranks may first spend
    what they have saved. (Less than that where the lane's own ``max_batch`` allows less.)

    Args:
        max_batch: the most records of a micro-batch.
        max_service_share: of the shortest deadline among the lanes that are awake (records wait, or
            came within the last second): how long others' records may hold the model. All that
            waits in that lane itself goes at once.
    """

    def __init__(
        self,
        lanes: Sequence[LaneSettings],
        service_times: ServiceTimes,
        *,
        max_batch: int,
        max_service_share: float,
    ) -> None:
        self._service_times = service_times
        self._lanes: dict[str, _Lane] = {}
        self._held: frozenset[str] = frozenset()
        self._short: Mapping[str, int] = {}
        self._shrunk_by = 0
        self.configure(lanes, max_batch=max_batch, max_service_share=max_service_share)

    def configure(
        self, lanes: Sequence[LaneSettings], *, max_batch: int, max_service_share: float
    ) -> None:
        """Other settings of the same lanes, from the next micro-batch on."""
        by_rank = sorted(lanes, key=lambda lane: lane.rank)
        assert not self._lanes or set(self._lanes) == {lane.name for lane in lanes}
        known = self._lanes
        self._lanes = {lane.name: known.get(lane.name, _Lane(lane, deque())) for lane in by_rank}
        for lane in by_rank:
            self._lanes[lane.name].settings = lane
        self._max_batch = max_batch
        self._max_service_share = max_service_share

    def restrain(self, shrunk_by: int, held: Iterable[str]) -> None:
        """What a lack of resources takes away.

        Args:
            shrunk_by: how often the largest micro-batch is halved.
            held: lanes that get their reserved share and not a record more.
        """
        self._shrunk_by = shrunk_by
        self._held = frozenset(held)
        batch_s = self._service_times.predict(self._max_batch)
        self._short = {
            name: max(1, int(self._lanes[name].settings.reserved_share * self._max_batch / batch_s))
            for name in (self._held if batch_s else ())
        }

    def __len__(self) -> int:
        return sum(len(lane.queue) for lane in self._lanes.values())

    def num_queued(self, lane: str) -> int:
        """Records waiting in a lane."""
        return len(self._lanes[lane].queue)

    def max_queued(self, lane: str) -> int:
        """How many records may wait in a lane before it is paused. Callable from any thread.

        In a held one about as many as its share comes to in a second: fewer would run out before
        more have come.
        """
        most = self._lanes[lane].settings.max_queued_records
        return min(self._short.get(lane, most), most)

    def num_taken(self) -> Mapping[str, int]:
        """Records that each lane was given, in all."""
        return {name: lane.taken for name, lane in self._lanes.items()}

    def put(self, lane: str, records: Sequence[Record]) -> None:
        """Adds records behind the lane's others."""
        if records:
            queued = self._lanes[lane]
            queued.queue.extend(records)
            queued.newest_us = max(queued.newest_us, records[-1].appended_us)

    def take(self, now_us: int) -> list[Record]:
        """Removes and returns the next micro-batch's records; in each lane oldest first.

        Empty only if nothing waits. ``now_us`` is on the clock of ``Record.appended_us``.
        """
        limit = self.limit(now_us)
        self._earn(limit)
        taken = dict.fromkeys(self._lanes, 0)
        room = limit

        def give(name: str, most: int) -> int:
            given = max(0, min(most, self._lanes[name].wants() - taken[name], room))
            taken[name] += given
            return given

        for name, lane in self._lanes.items():
            given = give(name, int(lane.credit))
            lane.credit -= given
            room -= given
        # Part of a record is earned as well: whoever has most of one gets it whole, and owes the
        # rest. Were it given by rank, the first lane would grow by what the others never get.
        for name, lane in sorted(self._lanes.items(), key=lambda item: -item[1].credit):
            if lane.credit > 0 and name not in self._held:
                given = give(name, 1)
                lane.credit -= given
                room -= given
        for name in self._lanes:
            if name not in self._held:
                room -= give(name, room)
        if room == limit:  # only held lanes wait, and none has earned a record: yet never idle
            taken.update(next(({name: 1} for name, one in self._lanes.items() if one.queue), {}))
        assert sum(taken.values()) <= limit
        return [record for name, num in taken.items() for record in self._pop(name, num)]

    def drop(self, partition: Partition) -> int:
        """Forgets the queued records of a partition; returns how many."""
        before = len(self)
        for lane in self._lanes.values():
            lane.queue = deque(one for one in lane.queue if one.partition != partition)
        return before - len(self)

    def limit(self, now_us: int) -> int:
        """The most records that the next micro-batch may hold: a bucket's edge, or all."""
        ceiling = max(SMALLEST_BUCKET, self._max_batch >> self._shrunk_by)
        ceiling = min(ceiling, self._max_batch)
        awake = [lane for lane in self._lanes.values() if lane.is_awake(now_us)]
        slacks_s = [self._slack_s(lane, now_us) for lane in awake]
        slack_s = min((one for one in slacks_s if one is not None), default=float("inf"))
        if not awake:
            return self._largest(slack_s, ceiling)
        shortest = min(awake, key=lambda lane: lane.settings.deadline_ms)
        held_s = self._max_service_share * shortest.settings.deadline_ms / 1000
        size = self._largest(min(held_s, slack_s), ceiling)
        # Its own records are not held back for it: those left behind would only be later.
        own = min(bucket_of(len(shortest.queue)), ceiling) if shortest.queue else 0
        return max(size, own)

    def _largest(self, allowed_s: float, ceiling: int) -> int:
        """The largest bucket that is done in time, or costs hardly more than one that is."""
        size = min(SMALLEST_BUCKET, ceiling)
        taken_s = self._service_times.predict(size)
        while size < ceiling:
            larger = min(2 * size, ceiling)
            larger_s = self._service_times.predict(larger)
            if larger_s > max(allowed_s, _FLAT * taken_s):
                break
            size, taken_s = larger, larger_s
        return size

    def _slack_s(self, lane: _Lane, now_us: int) -> float | None:
        """What is left of the deadline of a lane's oldest record, if it can still be met.

        None, too, for a lane that has more waiting than a micro-batch holds: it is overloaded, and
        smaller micro-batches would only make more of it late.
        """
        if not lane.queue or len(lane.queue) > self._max_batch:
            return None
        waited_us = now_us - lane.queue[0].appended_us
        slack_s = lane.settings.deadline_ms / 1000 - waited_us / 1e6
        return slack_s if slack_s >= self._service_times.predict(SMALLEST_BUCKET) else None

    def _earn(self, num_records: int) -> None:
        for lane in self._lanes.values():
            share = lane.settings.reserved_share
            # So much more than may be saved: higher ranks may be first, and nothing earned in a
            # saturated hour must be lost at the brim.
            most = share * self._max_batch + len(self._lanes)
            lane.credit = min(lane.credit + share * num_records, most)

    def _pop(self, name: str, num_records: int) -> list[Record]:
        lane = self._lanes[name]
        lane.taken += num_records
        return [lane.queue.popleft() for _ in range(num_records)]
