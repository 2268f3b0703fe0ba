"""The ledger sees every broken promise, and accuses nobody of what cannot be known."""

from typing import Any

import pytest

from schemas.lanes import LaneSettings
from schemas.settings import WindowSettings
from tapeline.bookkeeping import Event, Sightings, Source
from tapeline.ledger import Delivery, Feature, LaneAudit, Ledger, Letter, judge

START_US = 1_700_000_000_000_000
SECOND_US = 1_000_000
BOTH: tuple[Delivery, ...] = ("at_least_once", "exactly_once")


class Book:
    """A ledger filled by hand: windows of two rows, everything on partition 0 unless said."""

    def __init__(
        self,
        delivery: Delivery = "at_least_once",
        *,
        firsts: tuple[int, ...] = (0, 0),
        committed: int | None = 100,
        sightings: Sightings | None = None,
        lane: str = "realtime",
        **window: Any,
    ) -> None:
        limits = {"num_steps": 2, "max_gap_s": 60, "max_idle_records": 50, "max_symbols": 3}
        settings = LaneSettings(name=lane, rank=1, deadline_ms=50, reserved_share=0.5)
        self.sightings = sightings or Sightings(ttl_s=3600)
        self.ledger = Ledger(settings, WindowSettings(**limits | window), self.sightings, delivery)
        self.ends: dict[int, int] = {}
        for number, first in enumerate(firsts):
            self.ledger.add_partition(number, first, 100, committed)
            self.ends[number] = 100
        self._events: dict[tuple[int, int], Event] = {}
        self._at = 0

    def source(self, offset: int, partition: int = 0) -> Source:
        return Source(self.ledger.lane.topic, partition, offset)

    def record(
        self,
        offset: int,
        event_id: str | None = None,
        *,
        symbol: str = "S",
        partition: int = 0,
        time_us: int = START_US,
        after_s: float | None = None,
        replayed_from: Source | None = None,
    ) -> None:
        event = Event(event_id or f"e{partition}-{offset}", "V", symbol, time_us)
        self._events[partition, offset] = event
        appended_us = START_US + int((offset if after_s is None else after_s) * SECOND_US)
        self.ledger.add_record(partition, offset, event, appended_us, replayed_from=replayed_from)

    def poison(self, offset: int) -> None:
        appended_us = START_US + offset * SECOND_US
        self.ledger.add_record(0, offset, None, appended_us, digest=b"poison")

    def feature(self, offset: int, partition: int = 0, bits: bytes = b"", **changes: Any) -> None:
        event = self._events.get((partition, offset), Event("gone", "V", "S", START_US))
        source = changes.pop("source", self.source(offset, partition))
        self.ledger.add_feature(
            Feature(self._next("out"), source, event._replace(**changes), bits, START_US)
        )

    def letter(self, offset: int, stage: str = "decode", digest: bytes = b"poison") -> None:
        event = self._events.get((0, offset))
        self.ledger.add_letter(
            Letter(self._next("dlq"), self.source(offset), stage, event, digest, START_US)
        )

    def judge(self, *, settled: bool = True) -> LaneAudit:
        judge({self.ledger: self.ends}, settled=settled)
        return self.ledger.audit()

    def kinds(self, *, settled: bool = True) -> list[str]:
        self.judge(settled=settled)
        return [one.kind for one in self.ledger.violations()]

    def _next(self, topic: str) -> Source:
        self._at += 1
        return Source(topic, 0, self._at)


def full_window(delivery: Delivery = "at_least_once", **kwargs: Any) -> Book:
    """Three records of a symbol: the first warms up, two owe a feature. No output yet."""
    book = Book(delivery, **kwargs)
    for offset in (0, 1, 2):
        book.record(offset)
    return book


@pytest.mark.parametrize("delivery", BOTH)
def test_what_is_right_is_clean(delivery: Delivery) -> None:
    book = full_window(delivery)
    book.poison(3)
    book.feature(1)
    book.feature(2)
    book.letter(3)
    audit = book.judge()
    assert book.ledger.violations() == []
    assert (audit.records, audit.owed, audit.features) == (4, 2, 2)
    assert (audit.warm_up, audit.dead_letters, audit.repeats) == (1, 1, 0)


def test_lost_feature_is_seen_and_told() -> None:
    book = full_window()
    book.feature(1)
    assert book.kinds() == ["lost"]
    (violation,) = book.ledger.violations()
    assert (violation.event_id, violation.symbol, violation.source) == ("e0-2", "S", book.source(2))
    for part in ("market-events.realtime:0:2", "e0-2", "features.realtime", "look at"):
        assert part in violation.sentence


def test_poison_without_a_letter_is_lost() -> None:
    book = Book()
    book.poison(0)
    assert book.kinds() == ["lost"]


@pytest.mark.parametrize(("committed", "kinds"), [(2, []), (3, ["lost"]), (None, [])])
def test_only_what_is_committed_must_have_its_end(committed: int | None, kinds: list[str]) -> None:
    book = full_window(committed=committed)
    if committed:
        book.feature(1)
    assert book.kinds(settled=False) == kinds


def test_repeat_is_counted_at_least_once_and_a_violation_exactly_once() -> None:
    for delivery in BOTH:
        book = full_window(delivery)
        for offset in (1, 2, 1, 2):
            book.feature(offset)
        expected = [] if delivery == "at_least_once" else ["twice", "twice"]
        assert book.kinds() == expected
        assert book.ledger.audit().repeats == 2
        assert list(book.ledger.repeated_ids) == ["e0-1", "e0-2"]


def test_repeat_with_other_bits_differs() -> None:
    book = full_window()
    book.feature(1, bits=b"one")
    book.feature(2)
    book.feature(1, bits=b"two")
    assert book.kinds() == ["differs"]


@pytest.mark.parametrize("delivery", BOTH)
def test_two_records_of_one_event_give_one_feature(delivery: Delivery) -> None:
    book = full_window(delivery)
    book.record(3, "e0-2")
    book.feature(1)
    book.feature(2)
    assert book.judge().duplicates == 1
    assert book.ledger.violations() == []

    book = full_window(delivery)
    book.record(3, "e0-2")
    for offset in (1, 2, 3):
        book.feature(offset)
    assert book.kinds() == ["twice"]
    assert list(book.ledger.repeated_ids) == ["e0-2"]


def test_feature_and_letter_are_two_ends() -> None:
    for delivery, kinds in (("at_least_once", []), ("exactly_once", ["twice"])):
        book = full_window(delivery)  # type: ignore[arg-type]
        book.feature(1)
        book.feature(2)
        book.letter(2, "infer")
        assert book.kinds() == kinds


def test_order_is_per_symbol() -> None:
    book = full_window()
    for offset in (3, 4):
        book.record(offset, symbol="T")
    for offset in (4, 1, 2):
        book.feature(offset)
    assert book.kinds() == []

    book = full_window()
    book.feature(2)
    book.feature(1)
    assert book.kinds() == ["order"]


@pytest.mark.parametrize(
    "changes",
    [
        {"event_id": "another"},
        {"symbol": "T"},
        {"venue": "W"},
        {"event_time_us": START_US + 1},
    ],
)
def test_feature_that_says_something_else_breaks_the_lineage(changes: dict[str, Any]) -> None:
    book = full_window()
    book.feature(1)
    book.feature(2, **changes)
    assert book.kinds() == ["lineage"]


@pytest.mark.parametrize(
    "source",
    [
        Source("market-events.realtime", 0, 50),  # a gap
        Source("market-events.realtime", 0, 100),  # behind the end
        Source("market-events.realtime", 7, 0),
        Source("another", 0, 1),
    ],
)
def test_feature_of_no_record_breaks_the_lineage(source: Source) -> None:
    book = full_window()
    book.feature(1)
    book.feature(2)
    book.feature(2, source=source)
    assert book.kinds() == ["lineage"]


def test_feature_of_a_record_newer_than_the_audit_is_no_matter() -> None:
    book = full_window()
    book.feature(1)
    book.feature(2)
    book.feature(2, source=book.source(100))
    book.ends[0] = 101
    assert book.kinds(settled=False) == []


def test_letter_of_another_record_breaks_the_lineage() -> None:
    book = Book()
    book.poison(0)
    book.letter(0, digest=b"another")
    assert book.kinds() == ["lineage"]


def test_stray_output_breaks_the_lineage() -> None:
    book = full_window()
    book.feature(1)
    book.feature(2)
    book.ledger.add_stray(Source("out", 0, 9), START_US, "it is no feature")
    assert book.kinds() == ["lineage"]


def test_nothing_is_owed_for_warm_up_duplicates_and_poison() -> None:
    book = full_window()
    for offset in (0, 1, 2):
        book.feature(offset)
    assert book.kinds() == ["unowed"]

    book = full_window()
    book.record(3, "e0-0")
    for offset in (1, 2, 3):
        book.feature(offset)
    assert book.kinds() == ["unowed"]

    book = full_window()
    book.poison(3)
    for offset in (1, 2, 3):
        book.feature(offset)
    assert book.kinds() == ["unowed"]


def test_thinned_out_records_owe_nothing() -> None:
    book = full_window()
    book.ledger.lane = book.ledger.lane.model_copy(update={"stride": 10**9})
    assert book.judge().thinned == 2
    assert book.ledger.violations() == []

    book = full_window()
    book.ledger.lane = book.ledger.lane.model_copy(update={"stride": 10**9})
    book.feature(1)
    assert book.kinds() == ["unowed"]


def test_feature_without_a_commit_is_seen_exactly_once() -> None:
    for delivery, kinds in (("at_least_once", []), ("exactly_once", ["uncommitted"])):
        book = full_window(delivery, committed=2)  # type: ignore[arg-type]
        book.feature(1)
        book.feature(2)
        assert book.kinds() == kinds


def test_letter_of_the_model_is_an_end_and_still_a_row() -> None:
    book = full_window()
    book.letter(1, "infer")
    book.feature(2)
    audit = book.judge()
    assert book.ledger.violations() == []
    assert (audit.owed, audit.features, audit.dead_letters, audit.unfounded) == (2, 1, 1, 0)


def test_letter_without_a_cause_is_counted() -> None:
    book = full_window()
    book.feature(1)
    book.letter(2, "decode")
    assert book.judge().unfounded == 1
    assert book.ledger.violations() == []


def test_replay_takes_the_place_of_what_failed() -> None:
    """Its id is no duplicate's, and it owes what the first one owed; of two replays only one."""
    book = full_window()
    for offset in (3, 4):
        book.record(offset, "e0-1", replayed_from=book.source(1))
    book.letter(1, "infer")
    book.feature(2)
    assert book.kinds() == ["lost"]
    assert book.ledger.violations()[0].source == book.source(3)
    assert book.ledger.audit().duplicates == 1


def test_replay_that_fails_gives_its_place_to_the_next() -> None:
    book = full_window()
    for offset in (3, 4):
        book.record(offset, "e0-1", replayed_from=book.source(1))
    book.letter(1, "infer")
    book.letter(3, "infer")
    book.feature(2)
    book.feature(4)
    assert book.kinds() == []


def test_replay_of_what_did_not_fail_is_a_duplicate() -> None:
    book = full_window()
    book.record(3, "e0-1", replayed_from=book.source(1))
    for offset in (1, 2, 3):
        book.feature(offset)
    assert book.kinds() == ["twice"]


def test_replay_of_what_was_published_after_all_is_one_too_many() -> None:
    """A crash between letter and commit may have given the record a second chance."""
    book = full_window()
    book.record(3, "e0-1", replayed_from=book.source(1))
    book.letter(1, "infer")
    for offset in (1, 2, 3):
        book.feature(offset)
    assert book.kinds() == ["twice"]


def test_replay_of_a_letter_that_was_purged_may_be_either() -> None:
    book = full_window()
    book.record(3, "e0-1", replayed_from=book.source(1))
    book.feature(2)
    book.ledger.letters_gone_until_us = START_US + SECOND_US
    audit = book.judge()
    assert book.ledger.violations() == []
    assert (audit.optional, audit.unprovable) == (1, 1)


def test_of_two_partitions_the_one_that_was_published_is_the_first() -> None:
    book = full_window()
    book.record(0, partition=1)
    book.record(1, "e0-2", partition=1, after_s=90)
    book.feature(1)
    book.feature(1, partition=1)
    audit = book.judge()
    assert book.ledger.violations() == []
    assert audit.duplicates == 1


def test_event_lost_in_two_partitions_is_lost_once() -> None:
    book = full_window()
    book.record(0, partition=1)
    book.record(1, "e0-2", partition=1)
    book.feature(1)
    assert book.kinds() == ["lost"]


def test_copies_that_show_nothing_leave_windows_open() -> None:
    """Either may have been the row; so nobody can say whether the next record owes a feature."""
    book = Book()
    book.record(0, "same")
    book.record(0, "same", partition=1)
    book.record(1)
    book.record(1, partition=1)
    audit = book.judge()
    assert book.ledger.violations() == []
    assert audit.optional == 2


def test_lanes_share_their_ids() -> None:
    sightings = Sightings(ttl_s=3600)
    one = Book(sightings=sightings)
    two = Book(sightings=sightings, lane="batch")
    for book in (one, two):
        for offset in (0, 1):
            book.record(offset, f"{book.ledger.lane.name}-{offset}")
        book.record(2, "shared")
        book.feature(1)
    one.feature(2)
    judge({one.ledger: one.ends, two.ledger: two.ends}, settled=True)
    assert one.ledger.violations() == two.ledger.violations() == []
    assert two.ledger.audit().duplicates == 1


def test_id_is_remembered_no_longer_than_promised() -> None:
    for after_s, kinds in ((3600, ["twice"]), (3700, [])):
        book = full_window()
        book.record(3, "e0-2", after_s=after_s)
        for offset in (1, 2, 3):
            book.feature(offset)
        assert book.kinds() == kinds


def test_retention_leaves_windows_open_until_they_were_seen_to_fill() -> None:
    book = Book(firsts=(10,))
    for offset in (10, 11, 12):
        book.record(offset)
    book.feature(8)
    audit = book.judge()
    assert (audit.optional, audit.owed, audit.unprovable) == (1, 2, 1)
    assert [one.source.offset for one in book.ledger.violations()] == [11, 12]


def test_symbol_that_must_have_been_evicted_begins_anew_even_after_retention() -> None:
    book = Book(firsts=(10,), max_symbols=2)
    for offset, symbol in enumerate("ABC", 10):
        book.record(offset, symbol=symbol)
    audit = book.judge()
    assert (audit.optional, audit.warm_up) == (2, 1)


def test_copy_of_a_record_that_is_gone_is_known_by_its_feature() -> None:
    book = Book(firsts=(10,))
    for offset in (10, 11):
        book.record(offset)
    book.record(12, "gone")
    book.feature(8)
    book.feature(11)
    assert book.kinds() == []
    assert book.ledger.audit().duplicates == 1


def test_end_that_may_have_been_deleted_is_not_provable() -> None:
    book = full_window()
    book.poison(3)
    book.ledger.letters_gone_until_us = START_US + 3 * SECOND_US
    audit = book.judge()
    assert book.ledger.violations() == []
    assert audit.unprovable == 3

    book = full_window()
    book.ledger.features_gone_until_us = START_US + SECOND_US
    assert book.kinds() == ["lost"]
    assert book.ledger.violations()[0].source.offset == 2


@pytest.mark.parametrize(
    ("limits", "offsets", "times_s"),
    [
        ({"max_gap_s": 5}, (0, 1), (0, 6)),
        ({"max_idle_records": 5}, (0, 6), (0, 0)),
    ],
)
def test_emptied_window_owes_nothing(
    limits: dict[str, Any], offsets: tuple[int, int], times_s: tuple[int, int]
) -> None:
    for shift, warm_up in ((0, 2), (-1, 1)):
        book = Book(**limits)
        end, until_s = offsets[1], times_s[1]
        end, until_s = (end, until_s + shift) if until_s else (end + shift, 0)
        book.record(offsets[0])
        book.record(end, time_us=START_US + until_s * SECOND_US)
        assert book.judge().warm_up == warm_up


def test_first_violations_are_kept_and_all_are_counted() -> None:
    book = Book()
    for offset in range(51):
        book.record(offset)
    audit = book.judge()
    assert audit.violations["lost"] == 50
    kept = book.ledger.violations()
    assert [one.source.offset for one in kept] == list(range(1, 21))
