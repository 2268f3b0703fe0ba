"""What a dead-letter topic holds: letters, receipts, strangers; and which of them are meant."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

from schemas.codec import Codec
from schemas.errors import ConfigError, PoisonRecord
from schemas.messages import DeadLetter, Headers

RECEIPT_HEADER = "dlq-receipt"
"""On a receipt: the offset of the letter that it closes, in decimal."""
STATE_HEADER = "dlq-state"
"""On a receipt: what became of the letter."""

Closed = Literal["replayed", "purged"]
State = Literal["open", "replayed", "purged", "unreadable"]
_CLOSED: Mapping[str, Closed] = {"replayed": "replayed", "purged": "purged"}


class LetterId(NamedTuple):
    """Where a letter's own record is: ``<lane>:<partition>:<offset>`` of ``<lane topic>.dlq``."""

    lane: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.lane}:{self.partition}:{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises ConfigError."""
        lane, *numbers = text.rsplit(":", 2)
        if not lane or len(numbers) != 2 or not all(map(_is_number, numbers)):
            raise ConfigError(
                f"{text!r} is no letter's ID; write lane:partition:offset as `tapeline dlq ls` "
                "shows it, for example realtime:2:17"
            )
        return cls(lane, int(numbers[0]), int(numbers[1]))


class Group(NamedTuple):
    """What letters have in common when they failed for the same cause."""

    lane: str
    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter and where its own record is. ``dead`` holds the original, untouched."""

    id: LetterId
    dead: DeadLetter

    @property
    def group(self) -> Group:
        return Group(self.id.lane, self.dead.stage, self.dead.reason)

    @property
    def key(self) -> bytes | None:
        return self.dead.key

    @property
    def failed_at_us(self) -> int:
        return self.dead.failed_at_us

    @property
    def source(self) -> str:
        """``topic:partition:offset`` of the original."""
        dead = self.dead
        return f"{dead.source_topic}:{dead.source_partition}:{dead.source_offset}"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record on a DLQ topic that is neither letter nor receipt; never replayed.

    Attributes:
        failed_at_us: when it was appended; the broker's clock.
        why: one sentence.
    """

    id: LetterId
    key: bytes | None
    value: bytes | None
    headers: Headers
    failed_at_us: int
    why: str

    @property
    def group(self) -> Group:
        return Group(self.id.lane, "-", "unreadable")


class Receipt(NamedTuple):
    """Says what became of the letter at ``letter_offset`` of the receipt's own partition."""

    id: LetterId
    letter_offset: int
    state: Closed


Record = Letter | Unreadable | Receipt


def classify(
    codec: Codec,
    id: LetterId,
    key: bytes | None,
    value: bytes | None,
    headers: Headers,
    appended_us: int,
) -> Record:
    """What a record of a DLQ topic is.

    Raises TransientError or ConfigError if the Schema Registry does not answer.
    """
    if value is None and (receipt := _receipt(id, headers)):
        return receipt
    try:
        return Letter(id, codec.decode_dead_letter(value, headers))
    except PoisonRecord as poison:
        return Unreadable(id, key, value, headers, appended_us, str(poison))


def receipt_headers(letter_offset: int, state: Closed) -> list[tuple[str, bytes]]:
    """The headers of a receipt; it has neither key nor value."""
    return [(RECEIPT_HEADER, str(letter_offset).encode()), (STATE_HEADER, state.encode())]


def _receipt(id: LetterId, headers: Headers) -> Receipt | None:
    """None unless it closes an earlier letter: a receipt for later ones would lose them unseen."""
    said = {name: (value or b"").decode("ascii", "replace") for name, value in headers}
    offset, state = said.get(RECEIPT_HEADER, ""), said.get(STATE_HEADER, "")
    if not _is_number(offset) or int(offset) >= id.offset:
        return None
    closed = _CLOSED.get(state)
    return None if closed is None else Receipt(id, int(offset), closed)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which letters are meant: those of ``ids`` if there are any, else all that every filter holds.

    An empty filter holds for everything. An unreadable record has no stage and no reason.

    Attributes:
        symbols: keys of the original records.
        since_us, until_us: of the failure; Unix epoch, microseconds, the first included.
    """

    ids: frozenset[LetterId] = frozenset()
    lanes: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    symbols: tuple[str, ...] = ()
    since_us: int | None = None
    until_us: int | None = None

    def __post_init__(self) -> None:
        assert not (self.ids and self.has_filter), "IDs or filters, not both"

    @property
    def has_filter(self) -> bool:
        return bool(self.lanes or self.stages or self.reasons or self.symbols) or self.is_timed

    @property
    def is_timed(self) -> bool:
        return self.since_us is not None or self.until_us is not None

    def holds(self, record: Letter | Unreadable) -> bool:
        if self.ids:
            return record.id in self.ids
        group = record.group
        return (
            _holds(self.lanes, group.lane)
            and _holds(self.stages, group.stage)
            and _holds(self.reasons, group.reason)
            and (not self.symbols or record.key in [name.encode() for name in self.symbols])
            and (self.since_us is None or record.failed_at_us >= self.since_us)
            and (self.until_us is None or record.failed_at_us < self.until_us)
        )


def _holds(wanted: Sequence[str], found: str) -> bool:
    return not wanted or found in wanted


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 20
