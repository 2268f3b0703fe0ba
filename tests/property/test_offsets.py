"""How far a partition may be committed, and where a replay of it begins."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.offsets import PartitionProgress, Span, decode_metadata, encode_metadata
from consumers.records import Assignment, CommitPoint

PARTITION = ("lane", 3)
OFFSETS = st.integers(0, 2**62)


def new_progress(live_from: int = 100, replay_from: int = 90) -> PartitionProgress:
    return PartitionProgress(Assignment(PARTITION, live_from, replay_from))


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=30), data=st.data())
def test_commit_never_passes_a_span_in_flight(sizes: list[int], data: st.DataObject) -> None:
    """Whatever the order of completion, a crash loses no record; in the end nothing is left."""
    progress = new_progress()
    end = progress.committable
    in_flight: list[tuple[int, Span]] = []
    for size in sizes:
        assert progress.is_idle == (not in_flight)
        end += size
        in_flight.append((end - size, progress.start(end, 0.0)))
    newest = progress.committable
    for first, span in data.draw(st.permutations(in_flight)):
        progress.finish(span)
        in_flight.remove((first, span))
        assert newest <= progress.committable <= min([first for first, _ in in_flight], default=end)
        newest = progress.committable
    assert progress.is_idle
    assert progress.committable == end


class Checkpoint(NamedTuple):
    """What the windows said: at ``position`` a replay from ``replay_from`` rebuilds them."""

    position: int
    replay_from: int


@given(st.data())
def test_replay_offset_is_that_of_a_checkpoint_at_or_below_the_commit(
    data: st.DataObject,
) -> None:
    """Appends, checkpoints, ends and commits in any order: no commit names a later checkpoint.

    A later one might have let go of records that the windows at the commit still need.
    """
    progress = new_progress()
    checkpoints = [Checkpoint(100, 90)]
    in_flight: list[Span] = []
    committed = 100
    for _ in range(data.draw(st.integers(0, 40))):
        match data.draw(st.sampled_from(["append", "append", "checkpoint", "finish", "commit"])):
            case "append":
                progress.appended = max(progress.appended, 100) + data.draw(st.integers(1, 4))
                in_flight.append(progress.start(progress.appended, 0.0))
            case "checkpoint":
                newest = checkpoints[-1]
                replay_from = data.draw(st.integers(newest.replay_from, progress.appended))
                progress.checkpoint(replay_from)
                if progress.appended > newest.position:
                    checkpoints.append(Checkpoint(progress.appended, replay_from))
            case "finish" if in_flight:
                span = data.draw(st.sampled_from(in_flight))
                in_flight.remove(span)
                progress.finish(span)
            case "commit":
                point = progress.commit_point()
                if progress.committable == committed:
                    assert point is None, "nothing new"
                    continue
                committed = progress.committable
                newest = max(one for one in checkpoints if one.position <= committed)
                assert point == CommitPoint(PARTITION, committed, newest.replay_from)
                assert point.replay_from <= point.offset


def test_rebuilding_windows_makes_no_checkpoint() -> None:
    """Halfway through a replay the windows are not yet what the commit promised."""
    progress = new_progress(live_from=100, replay_from=90)
    progress.appended = 95
    progress.checkpoint(94)
    progress.appended = 105
    progress.finish(progress.start(105, 0.0))
    assert progress.commit_point() == CommitPoint(PARTITION, 105, 90)
    progress.checkpoint(97)
    progress.appended = 106
    progress.finish(progress.start(106, 0.0))
    assert progress.commit_point() == CommitPoint(PARTITION, 106, 97)
    assert progress.commit_point() is None


def test_a_commit_that_was_not_taken_is_said_again() -> None:
    progress = new_progress()
    progress.commit_failed()
    assert progress.commit_point() is None, "there was nothing to take"
    progress.appended = 105
    progress.finish(progress.start(105, 0.0))
    point = progress.commit_point()
    progress.commit_failed()
    assert progress.commit_point() == point
    assert progress.commit_point() is None


def test_spans_go_forward_and_finish_once() -> None:
    progress = new_progress()
    with pytest.raises(AssertionError):
        progress.start(100, 0.0)
    span = progress.start(101, 0.0)
    with pytest.raises(AssertionError):
        progress.start(101, 0.0)
    progress.finish(span)
    with pytest.raises(AssertionError):
        progress.finish(span)


@given(replay_from=OFFSETS, committed=OFFSETS)
def test_metadata_makes_the_round_trip(replay_from: int, committed: int) -> None:
    text = encode_metadata(CommitPoint(PARTITION, committed, replay_from))
    assert len(text) <= 40
    assert decode_metadata(text, committed) == min(replay_from, committed)


@given(metadata=st.one_of(st.none(), st.text(), st.integers().map(str)), committed=OFFSETS)
def test_foreign_metadata_means_no_replay(metadata: str | None, committed: int) -> None:
    """Somebody else's commit: the committed offset is all there is."""
    assert decode_metadata(metadata, committed) == committed


@pytest.mark.parametrize("number", ["", " 5", "-5", "5 ", "five", "5.0", "²"])
def test_broken_metadata_means_no_replay(number: str) -> None:
    prefix = encode_metadata(CommitPoint(PARTITION, 0, 0)).removesuffix("0")
    assert decode_metadata(prefix + number, 77) == 77
