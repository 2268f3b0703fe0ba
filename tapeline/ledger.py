"""The ledger: what a lane owes for its records, and whether it was paid once, in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

Kind = Literal["lost", "twice", "differs", "order", "lineage", "unowed", "uncommitted"]


class Source(NamedTuple):
    """Where a record stands."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}:{self.partition}:{self.offset}"


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise.

    Attributes:
        symbol, event_id: "" where the record does not decode.
        source: of the input record concerned; where the output stands, if it has no such record.
        at_us: when that record was appended; Unix epoch.
        sentence: what is wrong, with whom, and what to look at.
    """

    kind: Kind
    lane: str
    venue: str
    symbol: str
    event_id: str
    source: Source
    at_us: int
    sentence: str


@dataclass(frozen=True, slots=True)
class LaneAudit:
    """The counts of one lane.

    Attributes:
        records: input records, from the first that is still there to the end.
        owed: features owed for certain; letters of stage infer have taken their place in some.
        features: input records with a feature of their own.
        repeats: features and letters published again for the same record.
        warm_up, thinned, duplicates: records that owe nothing, by reason.
        dead_letters: input records with a letter.
        optional: records of which nobody can say whether they owe a feature.
        pending: at or above the committed offset and without an end, which they may be.
        unprovable: without an end that retention or a purge may have taken away, and outputs whose
            record is gone.
        unfounded: letters for records that decode.
        violations: how many of each kind.
    """

    lane: str
    records: int = 0
    owed: int = 0
    features: int = 0
    repeats: int = 0
    warm_up: int = 0
    thinned: int = 0
    duplicates: int = 0
    dead_letters: int = 0
    optional: int = 0
    pending: int = 0
    unprovable: int = 0
    unfounded: int = 0
    violations: Mapping[Kind, int] = field(default_factory=dict)
