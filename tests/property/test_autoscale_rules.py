"""The rules of scaling: what they promise, over random loads and histories."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapeline.autoscale.rules import (
    Bounds,
    LaneLoad,
    Memory,
    desired_replicas,
    desired_workers,
)

BOUNDS = Bounds(least=1, most=10, utilisation=0.8, start_s=8, stop_s=3, idle_s=60)


def lane(rate: float = 0, lag: int = 0, drain_s: float = 10, busy: int = 16) -> LaneLoad:
    return LaneLoad("realtime", rate, lag, drain_s, busy if rate or lag else 0)


def decide(current: int, *lanes: LaneLoad, memory: Memory = Memory(), now_s: float = 0,  # noqa: B008
           bounds: Bounds = BOUNDS, capacity: float = 100):  # fmt: skip
    return desired_workers(lanes, capacity, current, bounds, memory, now_s)


@pytest.mark.parametrize(
    ("current", "lanes", "target"),
    [
        (1, [lane(rate=50)], 1),
        (1, [lane(rate=94)], 1),  # more than planned, but it can do it
        (1, [lane(rate=160)], 2),
        (1, [lane(rate=161)], 3),
        (1, [lane(rate=10_000)], 10),  # the most there may be
        (1, [lane(rate=1_000, busy=3)], 3),  # a fourth would have nothing to do
        (2, [lane(rate=20, lag=100)], 2),  # gone before help comes
        (2, [lane(rate=20, lag=10_000)], 10),
        (1, [lane(rate=40), lane(rate=50, lag=0), lane(rate=70)], 2),  # lanes add up
        (1, [lane(lag=20_000, drain_s=1_000)], 1),  # a backfill may take its time
        (0, [lane(lag=1)], 1),  # wakes on lag alone
        (0, [lane(rate=500)], 7),
    ],
)
def test_the_number_is_the_work_by_what_one_can_do(
    current: int, lanes: list[LaneLoad], target: int
) -> None:
    decision, _ = decide(current, *lanes)
    assert decision.target == target, decision


def test_lag_is_told_in_seconds() -> None:
    assert decide(3, lane(rate=100, lag=400))[0].lag_s == 2
    assert decide(1, lane(rate=100, lag=400))[0].lag_s == math.inf
    assert decide(1, lane(rate=100))[0].lag_s == 0


def test_those_too_many_leave_when_they_have_cost_what_a_change_costs() -> None:
    """From 5 to 2: three to start again, and two rebalances of five, 54 replica-seconds."""
    memory, now_s = Memory(), 0.0
    targets = []
    while now_s < 30:
        decision, memory = decide(5, lane(rate=150), memory=memory, now_s=now_s)
        targets.append(decision.target)
        if decision.target < 5:
            break
        now_s += 2
    assert now_s == 18  # three too many for 18 s
    assert targets[-1] == 2


def test_a_lag_that_only_all_of_them_clear_keeps_all_of_them() -> None:
    """Three clear 360 in time, and so need no help; two would, so the third is not sent away."""
    memory, now_s, current = Memory(), 0.0, 3
    for lag in (360, 350, 340, 330, 320, 310, 300, 290):
        decision, memory = decide(
            current, lane(rate=60, lag=lag), memory=memory, now_s=now_s, capacity=40
        )
        assert decision.target == 3, decision
        now_s += 10


def test_what_was_needed_meanwhile_stays() -> None:
    memory = Memory()
    for now_s in range(0, 200, 2):
        rate = 390 if now_s % 10 == 0 else 150  # five are needed now and then
        decision, memory = decide(5, lane(rate=rate), memory=memory, now_s=now_s)
        assert decision.target == 5


def test_the_last_one_goes_after_silence_if_none_may_be_left() -> None:
    none = Bounds(0, 10, 0.8, 8, 3, 60)
    memory, current = Memory(), 1
    for now_s in range(0, 62, 2):
        decision, memory = decide(current, lane(), memory=memory, now_s=now_s, bounds=none)
        assert decision.target == (0 if now_s >= 60 else 1), now_s
    decision, memory = decide(0, lane(), memory=memory, now_s=100, bounds=none)
    assert decision.target == 0
    assert decide(0, lane(lag=1), memory=memory, now_s=102, bounds=none)[0].target == 1
    assert decide(1, lane(), memory=Memory(), now_s=10**6)[0].target == 1, "one must be left"


loads = st.builds(
    lane,
    rate=st.floats(0, 1e5),
    lag=st.integers(0, 10**7),
    drain_s=st.floats(0.1, 1000),
    busy=st.integers(1, 64),
)


@given(
    st.lists(loads, min_size=1, max_size=5), st.floats(1, 1e5), st.integers(0, 12),
    st.integers(0, 3), st.integers(3, 12),
)  # fmt: skip
def test_never_out_of_bounds_and_never_the_wrong_way(
    lanes: list[LaneLoad], capacity: float, current: int, least: int, most: int
) -> None:
    bounds = Bounds(least, most, 0.8, 8, 3, 60)
    for rule in (desired_workers, desired_replicas):
        decision, memory = rule(lanes, capacity, current, bounds, Memory(), 5.0)
        if not least <= current <= most:
            continue
        assert least <= decision.target <= most
        assert min(current, decision.needed) <= decision.target <= max(current, decision.needed)
        more = [LaneLoad("x", 2 * one.rate, 2 * one.lag, one.drain_target_s, one.num_busy)
                for one in lanes]  # fmt: skip
        assert rule(more, capacity, current, bounds, Memory(), 5.0)[0].needed >= decision.needed
        assert memory.now_s == 5.0


@given(st.lists(st.floats(0, 900), min_size=30, max_size=60))
def test_in_a_steady_load_with_noise_the_number_comes_to_rest(noise: list[float]) -> None:
    """Whatever came before: after it, at most one change up and one down."""
    memory, current, now_s = Memory(), 3, 0.0
    for rate in noise:
        decision, memory = decide(current, lane(rate=rate), memory=memory, now_s=now_s)
        current, now_s = decision.target, now_s + 2
    changes = []
    for _ in range(200):
        decision, memory = decide(current, lane(rate=310), memory=memory, now_s=now_s)
        if decision.target != current:
            changes.append(decision.target - current)
        current, now_s = decision.target, now_s + 2
    assert current == 4
    assert len(changes) <= 2
