"""Lag in seconds, from looks at the offsets alone."""

import pytest

from tapeline.lag import PartitionLag
from tapeline.metrics.lag import LagClock


def at(end: int, committed: int, lane: str = "realtime", partition: int = 0) -> PartitionLag:
    return PartitionLag(lane, lane, partition, committed, committed, end, end - committed)


def test_a_record_is_as_old_as_the_look_that_saw_it_written() -> None:
    clock = LagClock()
    assert clock.look([at(100, 100)], 10.0) == {"realtime": (0, 0.0)}
    # 100 more came between 10 s and 20 s; half of them are done: the next came at 15 s.
    assert clock.look([at(200, 150)], 20.0) == {"realtime": (50, 5.0)}
    # Nothing new, nothing done: it gets older.
    assert clock.look([at(200, 150)], 30.0) == {"realtime": (50, 15.0)}
    assert clock.look([at(200, 200)], 40.0) == {"realtime": (0, 0.0)}


def test_records_older_than_the_first_look_are_as_old_as_that() -> None:
    clock = LagClock()
    assert clock.look([at(1_000, 10)], 5.0) == {"realtime": (990, 0.0)}
    assert clock.look([at(1_000, 10)], 65.0) == {"realtime": (990, 60.0)}


def test_a_lane_is_as_late_as_its_partition_that_is_furthest_behind() -> None:
    clock = LagClock()
    looks = [at(10, 10), at(10, 10, partition=1), at(5, 5, "batch")]
    clock.look(looks, 0.0)
    looks = [at(20, 20), at(20, 10, partition=1), at(6, 5, "batch")]
    assert clock.look(looks, 8.0) == {"realtime": (10, 8.0), "batch": (1, 8.0)}


def test_a_topic_that_was_made_anew_begins_anew() -> None:
    clock = LagClock()
    clock.look([at(500, 500)], 0.0)
    assert clock.look([at(3, 0)], 100.0) == {"realtime": (3, 0.0)}
    assert clock.look([at(3, 0)], 101.0)["realtime"][1] == pytest.approx(1.0)
