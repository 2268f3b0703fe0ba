"""The stream side's vocabulary."""

from typing import NamedTuple

from schemas.messages import Headers

Partition = tuple[str, int]
"""Topic and partition number."""


class Record(NamedTuple):
    """One Kafka record of a lane, as it was polled.

    Attributes:
        appended_us: the broker's timestamp; Unix epoch, microseconds (of millisecond resolution).
        polled_us: when the poller had it, on this machine's clock.
    """

    lane: str
    partition: Partition
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    appended_us: int
    polled_us: int = 0

    @property
    def source(self) -> str:
        """``topic:partition:offset``: what the first-seen table remembers."""
        topic, number = self.partition
        return f"{topic}:{number}:{self.offset}"


class Assignment(NamedTuple):
    """A partition that this worker owns from now on.

    Attributes:
        live_from: the committed offset: features are owed from here on.
        replay_from: where reading begins, to rebuild the windows; at most ``live_from``.
    """

    partition: Partition
    live_from: int
    replay_from: int


class CommitPoint(NamedTuple):
    """What to commit for a partition: the next offset to process, and where its replay begins."""

    partition: Partition
    offset: int
    replay_from: int
