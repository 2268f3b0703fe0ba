"""How far a partition has come: what may be committed, and where a replay would begin.

Sans-IO. The committed offset's metadata carries the replay offset, so that the topic itself is the
state store (docs/DESIGN.md, 3.3).
"""

from collections import deque
from dataclasses import dataclass

from consumers.records import Assignment, CommitPoint

_METADATA_PREFIX = "tapeline/1 replay="


def encode_metadata(point: CommitPoint) -> str:
    """The metadata string of a commit; at most 40 bytes of Kafka's 4096."""
    return f"{_METADATA_PREFIX}{point.replay_from}"


def decode_metadata(metadata: str | None, committed: int) -> int:
    """The replay offset in a commit's metadata; the committed offset itself if it has none."""
    if not metadata or not metadata.startswith(_METADATA_PREFIX):
        return committed
    text = metadata.removeprefix(_METADATA_PREFIX)
    return min(int(text), committed) if text.isdecimal() else committed


@dataclass(slots=True, eq=False)
class Span:
    """The records of one partition in one micro-batch.

    Attributes:
        end: the offset after its last record.
        started_s: when they left the queue; whose clock is the caller's business.
        finished: its features and dead letters are durable.
    """

    end: int
    started_s: float
    finished: bool = False


class PartitionProgress:
    """One assignment of one partition; made when it is assigned, closed when it is revoked.

    It is the epoch, too: work that comes back to a closed one is void, whoever owns the partition
    by then, this worker included.

    Invariant: ``committable`` never passes an unfinished span and never falls.
    """

    def __init__(self, assignment: Assignment) -> None:
        self.partition = assignment.partition
        self.live_from = assignment.live_from
        self.committable = assignment.live_from
        self.appended = assignment.replay_from
        """The next offset that the windows have not seen."""
        self.closed = False
        self.passed_over: set[bytes] = set()
        """The symbols of events that were skipped, until the symbol's next feature."""
        self._committed = assignment.live_from
        self._spans: deque[Span] = deque()
        self._checkpoints = deque([(assignment.live_from, assignment.replay_from)])

    @property
    def is_live(self) -> bool:
        """Nothing is left to be replayed: a feature is owed for all that comes."""
        return self.appended >= self.live_from

    @property
    def is_idle(self) -> bool:
        """Nothing is in flight."""
        return not self._spans

    @property
    def has_advanced(self) -> bool:
        """There is something to commit, whether or not it has been committed already."""
        return self.committable > self.live_from

    @property
    def oldest_started_s(self) -> float | None:
        """When the oldest record in flight left its queue; that record is at ``committable``."""
        return self._spans[0].started_s if self._spans else None

    def start(self, end: int, now_s: float) -> Span:
        """Records up to ``end``, exclusive, are in flight from now on."""
        assert end > self.committable
        assert not self._spans or end > self._spans[-1].end
        span = Span(end, now_s)
        self._spans.append(span)
        return span

    def finish(self, span: Span) -> None:
        """Marks a span; spans may finish in any order."""
        assert not span.finished
        span.finished = True
        while self._spans and self._spans[0].finished:
            self.committable = self._spans.popleft().end

    @property
    def is_past_checkpoint(self) -> bool:
        """The windows have changed since the last checkpoint."""
        return self.appended > self._checkpoints[-1][0]

    def checkpoint(self, replay_offset: int) -> None:
        """Notes that a replay from ``replay_offset`` gives the windows as they are now."""
        if self.is_past_checkpoint:
            self._checkpoints.append((self.appended, replay_offset))

    def commit_point(self) -> CommitPoint | None:
        """What to commit now; None if nothing is new."""
        if self.committable == self._committed:
            return None
        self._committed = self.committable
        return self.point_at(self.committable)

    def commit_failed(self) -> None:
        """The broker did not take the last commit: the next one says all of it again."""
        self._committed = self.live_from

    def point_at(self, position: int) -> CommitPoint:
        """What to commit when every record below ``position`` is done; positions never fall.

        The replay offset is that of the newest checkpoint that ``position`` has reached: the
        windows of any later position need no older record, for replay offsets never fall.
        """
        assert position >= self.committable
        while len(self._checkpoints) > 1 and self._checkpoints[1][0] <= position:
            self._checkpoints.popleft()
        return CommitPoint(self.partition, position, self._checkpoints[0][1])
