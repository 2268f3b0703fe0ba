"""The ledger: what a lane owes for its records, and whether it was paid once, in order.

Sans-IO. A ledger is given a lane's input records, then what came out, and judges. It knows the
rules of docs/DESIGN.md 3.3 to 3.5 by itself and imports nothing of the worker's: an auditor does
not trust the books of the accused. Nobody is accused of what cannot be known; it is counted.
"""

import heapq
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, NamedTuple, get_args

from schemas.lanes import LaneSettings
from schemas.settings import WindowSettings
from tapeline.bookkeeping import (
    COPY,
    FIRST,
    Entry,
    Event,
    Partition,
    Sightings,
    Source,
    Windows,
    offsets_maybe_late,
)

Kind = Literal["lost", "twice", "differs", "order", "lineage", "unowed", "uncommitted"]
Delivery = Literal["at_least_once", "exactly_once"]


class Feature(NamedTuple):
    """One record of an output topic. ``bits``: a digest of what the model said."""

    at: Source
    source: Source
    event: Event
    bits: bytes
    appended_us: int


class Letter(NamedTuple):
    """One dead letter. ``event`` of the original it carries, None if that does not decode."""

    at: Source
    source: Source
    stage: str
    event: Event | None
    digest: bytes
    appended_us: int


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise.

    Attributes:
        venue, symbol, event_id: "" where the record does not decode.
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
        owed: records that owe a feature for certain; a letter of stage infer stands for one, too.
        features: input records with a feature of their own.
        repeats: features and letters published again for the same record.
        warm_up, thinned, duplicates: records that owe nothing, by reason.
        skipped: without an end in a lane that skips what is late, and they may have been late.
        dead_letters: input records with a letter.
        optional: records of which nobody can say whether they owe a feature.
        pending: at or above the committed offset and without an end, as they may be.
        unprovable: without an end that retention or a purge may have taken away, and outputs whose
            record is gone.
        unfounded: letters for records that owe none.
        violations: how many of each kind.
    """

    lane: str
    records: int = 0
    owed: int = 0
    features: int = 0
    repeats: int = 0
    warm_up: int = 0
    thinned: int = 0
    skipped: int = 0
    duplicates: int = 0
    dead_letters: int = 0
    optional: int = 0
    pending: int = 0
    unprovable: int = 0
    unfounded: int = 0
    violations: Mapping[Kind, int] = field(default_factory=dict)


class Ledger:
    """One lane's book. Fill it in this order: partitions, records, features, letters; then judge.

    Args:
        sightings: shared by all ledgers whose lanes share their first-seen ids.
        max_violations: kept; all are counted.
    """

    def __init__(
        self,
        lane: LaneSettings,
        window: WindowSettings,
        sightings: Sightings,
        delivery: Delivery,
        max_violations: int = 20,
    ) -> None:
        self.lane = lane
        self.repeated_ids: dict[str, None] = {}
        self.features_gone_until_us = self.letters_gone_until_us = -1.0
        """Outputs appended until then may have been deleted; infinite: any."""
        self._window = window
        self._skips = lane.expired == "skip"
        self.sightings = sightings
        self._exactly_once = delivery == "exactly_once"
        self._max_violations = max_violations
        self._partitions: dict[int, Partition] = {}
        self._gone: dict[Source, Entry] = {}
        self._newest: dict[tuple[int, int, str, str], int] = {}
        self._unknown: list[tuple[Source, Event | None, Source, int]] = []
        self._counts: Counter[str] = Counter()
        self._kinds: Counter[Kind] = Counter()
        self._first: list[tuple[int, int, Violation]] = []  # a heap, latest on top

    def add_partition(self, number: int, first: int, end: int, committed: int | None) -> None:
        """Records from ``first`` up to ``end``, exclusive, will follow.

        Args:
            committed: by the workers, before any output was read; None: nothing.
        """
        self._partitions[number] = Partition(self.lane.topic, number, first, end, committed)

    def add_record(
        self,
        partition: int,
        offset: int,
        event: Event | None,
        appended_us: int,
        *,
        digest: bytes | None = None,
        replayed_from: Source | None = None,
    ) -> None:
        """Adds an input record; ``event`` is None, and ``digest`` is given, where it is poison."""
        of = self._partitions[partition]
        entry = of.entries[offset] = Entry(of, offset, event, appended_us)
        entry.digest, entry.replayed_from = digest, replayed_from
        if event is not None:
            self.sightings.add(event.event_id, entry)

    def add_feature(self, feature: Feature) -> None:
        """Adds a record of the output topic, in the order of its offsets per partition."""
        entry = self._find(feature.source, feature.event, feature.at, feature.appended_us)
        if entry is None:
            return
        if entry.event not in (None, feature.event):
            self._accuse("lineage", entry, f"its feature at {feature.at} says {feature.event}")
        entry.num_features += 1
        if entry.num_features > 1:
            self._repeated(entry, f"its feature stands at {feature.at} once more")
            if entry.bits != feature.bits:
                self._accuse(
                    "differs", entry, f"its feature at {feature.at} has other bits than the first"
                )
            return
        entry.bits = feature.bits
        if self._skips:
            entry.published_us = feature.appended_us
        key = (feature.at.partition, entry.partition.number, *feature.event[1:3])
        newest = self._newest.get(key, -1)
        if entry.offset < newest:
            self._accuse(
                "order", entry, f"its feature at {feature.at} comes after that of offset {newest}"
            )
        self._newest[key] = max(newest, entry.offset)

    def add_letter(self, letter: Letter) -> None:
        """Adds a dead letter."""
        entry = self._find(letter.source, letter.event, letter.at, letter.appended_us)
        if entry is None:
            return
        is_other = letter.event != entry.event or entry.digest not in (None, letter.digest)
        if is_other:
            self._accuse("lineage", entry, f"its letter at {letter.at} holds another record")
        entry.num_letters += 1
        entry.stage = "infer" if "infer" in (entry.stage, letter.stage) else letter.stage
        if entry.num_letters > 1:
            self._repeated(entry, f"its letter stands at {letter.at} once more")

    def add_stray(self, at: Source, appended_us: int, what: str) -> None:
        """Notes a record among the outputs that is none."""
        self._accuse_of("lineage", Event("", "", "", 0), at, appended_us, what)

    def judge(self, ends: Mapping[int, int], *, settled: bool, asked_us: int) -> None:
        """Goes through the book; ``Sightings.resolve`` comes first.

        Args:
            ends: of each partition, asked after all outputs were read.
            asked_us: when it was asked how far is committed: what must have its end had it then.
        """
        for source, event, at, appended_us in self._unknown:
            if source.topic != self.lane.topic or source.offset >= ends.get(source.partition, 0):
                self._accuse_output(event, source, at, appended_us)
        for partition in self._partitions.values():
            interval_us = int(self.lane.min_interval_ms * 1000)
            windows = Windows(self._window, interval_us, partition.first)
            due_until = partition.committed or 0
            late = self._maybe_late(partition, asked_us)
            for entry in partition.entries.values():
                self._counts["records"] += 1
                self._counts["dead_letters"] += entry.num_letters > 0
                self._counts["features"] += entry.num_features > 0
                if entry.num_features and entry.num_letters:
                    self._repeated(entry, "it has both a feature and a letter")
                is_due = settled or entry.offset < due_until
                self._judge(entry, windows, is_due, entry.offset in late)
                is_early = entry.num_features and settled and partition.committed is not None
                if self._exactly_once and is_early and entry.offset >= due_until:
                    self._accuse(
                        "uncommitted", entry, f"it has a feature, but only {due_until} is committed"
                    )

    def accuse_lost(self, entry: Entry) -> None:
        """It should have its end, and has none."""
        lane = self.lane
        if entry.event is None:
            owes = f"it does not decode and has no letter in {lane.dlq_topic}"
        else:
            timely = "it was not past its deadline yet, " if self._skips else ""
            owes = (
                f"its window is full, {timely}and it has neither a feature in {lane.output_topic} "
                f"nor a letter in {lane.dlq_topic}"
            )
        self._accuse("lost", entry, owes)

    def audit(self) -> LaneAudit:
        """The counts, after the judgement."""
        kinds: dict[Kind, int] = {kind: self._kinds[kind] for kind in get_args(Kind)}
        return LaneAudit(self.lane.name, **self._counts, violations=kinds)

    def violations(self) -> list[Violation]:
        """The first ones, by when their records were appended."""
        return [one for _, _, one in sorted(self._first, reverse=True)]

    def __contains__(self, entry: Entry) -> bool:
        return self._partitions.get(entry.partition.number) is entry.partition

    def _maybe_late(self, partition: Partition, asked_us: int) -> set[int]:
        """The offsets that the lane may have skipped; none where it skips nothing."""
        if not self._skips:
            return set()
        return offsets_maybe_late(partition, self.lane.deadline_ms, asked_us)

    def _judge(self, entry: Entry, windows: Windows, is_due: bool, maybe_late: bool) -> None:
        event, counts = entry.event, self._counts
        if event is None:
            if entry.num_features:
                self._accuse("unowed", entry, "it has a feature, though it does not decode")
            elif not entry.num_letters and self._must_end(
                entry, is_due, self.letters_gone_until_us
            ):
                self.accuse_lost(entry)
            return
        if entry.role == COPY:
            counts["duplicates"] += 1
            counts["unfounded"] += entry.num_letters > 0
            if entry.num_features:
                self._accuse_copy(entry, event)
            return
        was_refused = entry.stage not in ("", "infer")  # then it is no row, if it was so rightly
        certain = entry.role == FIRST and not was_refused
        owes, reason = self._owes(event, entry.offset, windows, certain)
        is_missing = bool(owes and not entry.num_features and not entry.num_letters)
        gone_us = max(self.features_gone_until_us, self.letters_gone_until_us)
        can_be_owed = is_missing and (certain or entry.group is not None)
        must_end = can_be_owed and self._must_end(entry, is_due, gone_us)
        # What is not due yet may still become late.
        maybe_skipped = self._skips and is_missing and (maybe_late or not is_due)
        if reason:
            counts[reason] += 1
        elif owes and certain and not maybe_skipped:
            counts["owed"] += 1
        else:
            counts["skipped" if certain and must_end else "optional"] += 1
        if was_refused or (entry.num_letters and owes is False):
            counts["unfounded"] += 1
        if entry.num_features and owes is False and certain:
            self._accuse("unowed", entry, f"it has a feature, though it is {_WHY_NOT[reason]}")
        elif must_end and not maybe_skipped:
            if entry.group:
                entry.group.num_lost += 1
            else:
                self.accuse_lost(entry)

    def _owes(
        self, event: Event, offset: int, windows: Windows, certain: bool
    ) -> tuple[bool | None, str]:
        """Whether a feature is owed, if the event was not late; None: nobody can say.

        With the count of those that owe none for the same reason.
        """
        full, starts = windows.append(event, offset, certain=certain)
        if full is False:
            return False, "warm_up"
        if starts is False or not _is_sampled(event.event_id, self.lane.stride):
            return False, "thinned"
        return full and starts, ""

    def _must_end(self, entry: Entry, is_due: bool, gone_until_us: float) -> bool:
        if not is_due:
            self._counts["pending"] += 1
        elif entry.appended_us <= gone_until_us:
            self._counts["unprovable"] += 1
            return False
        return is_due

    def _find(
        self, source: Source, event: Event | None, at: Source, appended_us: int
    ) -> Entry | None:
        """The record that an output names; else notes or accuses it."""
        partition = self._partitions.get(source.partition)
        if source.topic != self.lane.topic or partition is None:
            self._unknown.append((source, event, at, appended_us))
        elif source.offset >= partition.end:
            self._unknown.append((source, event, at, appended_us))  # newer than the audit?
        elif source.offset < partition.first:
            return self._find_gone(source, event, partition, appended_us)
        elif (found := partition.entries.get(source.offset)) is not None:
            return found
        else:
            self._accuse_output(event, source, at, appended_us)
        return None

    def _find_gone(
        self, source: Source, event: Event | None, partition: Partition, appended_us: int
    ) -> Entry:
        """An entry for a record that retention took away, made from its first output."""
        entry = self._gone.get(source)
        if entry is None:
            self._counts["unprovable"] += 1
            entry = self._gone[source] = Entry(partition, source.offset, event, appended_us)
            if event is not None:
                self.sightings.add(event.event_id, entry)
        return entry

    def _repeated(self, entry: Entry, what: str) -> None:
        self._counts["repeats"] += 1
        if entry.event is not None:
            self.repeated_ids[entry.event.event_id] = None
        if self._exactly_once:
            self._accuse("twice", entry, what)

    def _accuse_copy(self, entry: Entry, event: Event) -> None:
        if self.sightings.published_elsewhere(event.event_id, entry):
            self.repeated_ids[event.event_id] = None
            self._accuse("twice", entry, "another record of the same event has a feature, too")
        else:
            self._accuse("unowed", entry, "it has a feature, though it is a duplicate")

    def _accuse(self, kind: Kind, entry: Entry, what: str) -> None:
        event = entry.event or Event("", "", "", 0)
        self._accuse_of(kind, event, entry.source, entry.appended_us, what)

    def _accuse_output(
        self, event: Event | None, source: Source, at: Source, appended_us: int
    ) -> None:
        what = f"it names {source}, and there is no such record"
        self._accuse_of("lineage", event or Event("", "", "", 0), at, appended_us, what)

    def _accuse_of(self, kind: Kind, event: Event, source: Source, at_us: int, what: str) -> None:
        self._kinds[kind] += 1
        whose = (
            f"event {event.event_id} of {event.venue} {event.symbol}" if event[0] else "a record"
        )
        when = datetime.fromtimestamp(at_us / 1e6, UTC).isoformat(timespec="milliseconds")
        sentence = f"{kind}: {whose} at {source}, appended {when}: {what}; {_LOOK_AT[kind]}"
        violation = Violation(
            kind, self.lane.name, event.venue, event.symbol, event.event_id, source, at_us, sentence
        )
        heapq.heappush(self._first, (-at_us, -self._kinds.total(), violation))
        if len(self._first) > self._max_violations:
            heapq.heappop(self._first)


def judge(ledgers: Mapping[Ledger, Mapping[int, int]], *, settled: bool, asked_us: int) -> None:
    """Judges the ledgers of all lanes together; each comes with the ends for ``Ledger.judge``."""
    tables = list({id(one.sightings): one.sightings for one in ledgers}.values())
    gone_until_us = max((one.letters_gone_until_us for one in ledgers), default=-1.0)
    for sightings in tables:
        sightings.resolve(gone_until_us)
    for ledger, ends in ledgers.items():
        ledger.judge(ends, settled=settled, asked_us=asked_us)
    for guess in (guess for one in tables for guess in one.guesses):
        if guess.num_lost == len(guess.entries):
            entry = guess.entries[0]
            next(one for one in ledgers if entry in one).accuse_lost(entry)


def _is_sampled(event_id: str, stride: int) -> bool:
    return stride == 1 or zlib.crc32(event_id.encode()) % stride == 0


_WHY_NOT = {"warm_up": "still warming up", "thinned": "thinned out by its lane"}

_LOOK_AT: Mapping[Kind, str] = {
    "lost": "look at the workers' logs around that time, and at this group's commits",
    "twice": "look for two workers with one instance_id, or a reader that is not read_committed",
    "differs": "look whether two workers ran with different models or machines",
    "order": "look for a rebalance around that time, and for a second producer on the topic",
    "lineage": "look at who else writes to the topic",
    "unowed": "look whether the workers ran with other settings than these",
    "uncommitted": "look whether the workers ran with delivery = exactly_once",
}
