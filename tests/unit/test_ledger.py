"""The ledger sees every broken promise, and accuses nobody of what cannot be known."""

from typing import Any

import pytest
from books import SECOND_US, START_US, Book, full_window

from tapeline.bookkeeping import Sightings, Source
from tapeline.ledger import Delivery, judge

BOTH: tuple[Delivery, ...] = ("at_least_once", "exactly_once")


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
    judge({one.ledger: one.ends, two.ledger: two.ends}, settled=True, asked_us=START_US)
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


@pytest.mark.parametrize(
    ("next_after_s", "kinds"),
    [(2.999, ["lost"]), (3, []), (3.001, []), (None, [])],
)
def test_missing_event_of_a_lane_that_skips_is_lost_if_it_was_not_late(
    next_after_s: float | None, kinds: list[str]
) -> None:
    """Appended at 1 s, late at 3 s; the symbol's next feature says when it was prepared."""
    book = full_window(skip_after_ms=2000)
    book.record(3, symbol="T")
    book.record(4, symbol="T")
    book.feature(4, after_s=2)  # another symbol's feature says nothing
    if next_after_s:
        book.feature(2, after_s=next_after_s)
    assert book.kinds() == kinds
    audit = book.ledger.audit()
    num_skipped = 0 if kinds else 1 if next_after_s else 2
    assert (audit.skipped, audit.owed) == (num_skipped, 3 - num_skipped)
    if kinds:
        assert "not past its deadline" in book.ledger.violations()[0].sentence


@pytest.mark.parametrize(("asked_after_s", "kinds"), [(3.999, ["lost"]), (4, [])])
def test_where_no_feature_follows_it_was_prepared_before_the_audit(
    asked_after_s: float, kinds: list[str]
) -> None:
    book = full_window(skip_after_ms=2000)
    book.feature(1, after_s=1)
    assert book.kinds(asked_after_s=asked_after_s) == kinds
    assert book.ledger.audit().skipped == 1 - len(kinds)


def test_only_the_first_of_two_equal_features_says_when() -> None:
    book = full_window(skip_after_ms=2000)
    book.feature(2, after_s=2)
    book.feature(2, after_s=60)
    assert book.kinds() == ["lost"]


def test_milliseconds_of_the_broker_are_rounded_down() -> None:
    """Prepared 0.6 ms after it was appended, late after 0.5: the broker stamps both alike."""
    book = full_window(skip_after_ms=0.5)
    book.feature(2, after_s=1)
    assert book.kinds() == []


def test_lane_that_does_not_skip_owes_however_late() -> None:
    book = full_window()
    book.feature(2, after_s=60)
    assert book.kinds() == ["lost"]
    assert book.ledger.audit().skipped == 0


def test_skipped_is_only_what_is_due_and_would_be_owed() -> None:
    book = full_window(skip_after_ms=1000, committed=2)
    book.poison(3)
    audit = book.judge(settled=False, asked_after_s=2)  # 2 and 3 may still have their end
    assert book.ledger.violations() == []
    assert (audit.warm_up, audit.skipped, audit.owed) == (1, 1, 0)
    assert (audit.optional, audit.pending) == (1, 2)

    book = full_window(skip_after_ms=1)
    book.poison(3)
    assert book.kinds() == ["lost"], "poison has a letter, late or not"

    book = full_window(skip_after_ms=1)
    book.letter(1, "infer")
    book.feature(2, after_s=60)
    audit = book.judge()
    assert (audit.owed, audit.skipped) == (2, 0)


def test_what_retention_may_have_taken_is_not_called_skipped() -> None:
    book = full_window(skip_after_ms=1)
    book.ledger.features_gone_until_us = START_US + SECOND_US
    audit = book.judge()
    assert (audit.skipped, audit.unprovable, audit.optional) == (1, 1, 1)


def test_copies_of_an_event_that_may_have_been_skipped_are_not_lost() -> None:
    book = full_window(skip_after_ms=1)
    book.record(0, partition=1)
    book.record(1, "e0-2", partition=1)
    book.feature(1, after_s=60)
    assert book.kinds() == []
    assert book.ledger.audit().optional == 2


def test_order_and_lineage_hold_in_a_lane_that_skips() -> None:
    book = full_window(skip_after_ms=1)
    book.feature(2, after_s=60)
    book.feature(1, after_s=60, symbol="T")
    book.record(3)
    book.feature(3, after_s=60)
    book.feature(0, after_s=60)
    assert sorted(book.kinds()) == ["lineage", "order", "unowed"]
