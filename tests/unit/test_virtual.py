"""The simulated overload: what lanes, one queue and strict priority do, as theory says."""

import statistics

import pytest

from benchmarks.virtual import Station, Way, shares, simulate_lanes, steady
from schemas.lanes import DEFAULT_LANES, LaneSettings

LANES = [LaneSettings(name=name, **values) for name, values in DEFAULT_LANES.items()]
RESERVED = {lane.name: lane.reserved_share for lane in LANES}
FIRST, *OTHERS = RESERVED
STATION = Station({4: 0.003, 8: 0.005, 16: 0.008, 32: 0.015, 64: 0.030}, prepare_s=0.002)
CAPACITY_HZ = 16 / 0.008  # realtime's deadline of 50 ms allows micro-batches of 10 ms
SECONDS = 6.0
REALTIME_HZ = 0.25 * CAPACITY_HZ


def with_shares(**changes: float) -> list[LaneSettings]:
    return [
        lane.model_copy(update={"reserved_share": changes.get(lane.name, 0.0)}) for lane in LANES
    ]


def overload(lanes: list[LaneSettings], station: Station = STATION) -> list[Way]:
    """Realtime at a quarter of the capacity, 1.75 times the capacity over the others."""
    arrivals_s = {FIRST: steady(REALTIME_HZ, SECONDS, from_s=0.0004)}
    for name in OTHERS:
        rate_hz = 1.75 * CAPACITY_HZ * (RESERVED[name] + 0.25 * (name == OTHERS[0])) / 0.75
        arrivals_s[name] = steady(rate_hz, SECONDS)
    return simulate_lanes(lanes, arrivals_s, station, until_s=SECONDS)


def of(ways: list[Way], lane: str) -> list[Way]:
    return [way for way in ways if way.lane == lane]


def test_model_is_never_idle_while_something_waits() -> None:
    ways = overload(LANES)
    assert len(ways) / SECONDS == pytest.approx(CAPACITY_HZ, rel=0.02)


def test_saturated_lanes_get_their_reserved_shares() -> None:
    arrivals_s = {name: steady(CAPACITY_HZ, SECONDS) for name in RESERVED}
    ways = simulate_lanes(LANES, arrivals_s, STATION, until_s=SECONDS)
    assert shares(ways, LANES) == pytest.approx(RESERVED, rel=0.05)


def test_what_realtime_leaves_goes_to_the_next_rank_and_background_keeps_its_share() -> None:
    found = shares(overload(LANES), LANES)
    assert found[FIRST] == pytest.approx(0.25, rel=0.05)
    assert found[OTHERS[0]] == pytest.approx(0.50, rel=0.05)
    for name in OTHERS[1:]:
        assert found[name] == pytest.approx(RESERVED[name], rel=0.05)


@pytest.mark.parametrize("max_in_flight", [1, 2, 4])
def test_realtime_waits_for_what_is_in_flight_and_for_nothing_else(max_in_flight: int) -> None:
    """For the next free slot, then for the micro-batches in front of its own at the model."""
    station = Station(STATION.service_s, STATION.prepare_s, max_in_flight=max_in_flight)
    realtime = of(overload(LANES, station), FIRST)
    assert len(realtime) > 0.98 * REALTIME_HZ * SECONDS
    longest_s = station.seconds(max(way.num_aboard for way in realtime))
    assert longest_s <= 0.010, "max_service_share of realtime's deadline"
    assert max(way.waited_s for way in realtime) <= longest_s + station.prepare_s
    worst_s = max(way.latency_s for way in realtime)
    assert worst_s <= (max_in_flight + 1) * longest_s + 2 * station.prepare_s
    if max_in_flight > 1:
        assert worst_s > 2 * station.seconds(16), "the others are in its way, but no more than that"


def test_one_queue_makes_realtime_wait_for_all_that_came_before() -> None:
    """A queue that is fed at twice its speed: who comes at ``t`` waits for ``t`` seconds."""
    only = [LANES[0].model_copy(update={"reserved_share": 1.0, "max_batch": 16})]
    everything_s = steady(2 * CAPACITY_HZ, SECONDS)
    ways = simulate_lanes(only, {FIRST: everything_s}, STATION, until_s=SECONDS)
    assert [way.arrived_s for way in ways] == pytest.approx(everything_s[: len(ways)], abs=1e-5)
    for way in ways[1000::1000]:
        assert way.latency_s == pytest.approx(way.arrived_s, rel=0.05, abs=0.05)


def test_strict_priority_starves_whoever_comes_last() -> None:
    ways = overload(with_shares())
    found = shares(ways, LANES)
    assert found[FIRST] == pytest.approx(0.25, rel=0.05)
    assert found[OTHERS[0]] == pytest.approx(0.75, rel=0.05)
    assert sum(found[name] for name in OTHERS[1:]) < 0.01
    strict_s = statistics.median(way.latency_s for way in of(ways, FIRST))
    lanes_s = statistics.median(way.latency_s for way in of(overload(LANES), FIRST))
    assert lanes_s == pytest.approx(strict_s, rel=0.1), "shares cost realtime nothing"


def test_low_load_waits_for_nothing() -> None:
    """One event at a time: prepared, computed, done."""
    ways = simulate_lanes(LANES, {FIRST: steady(20, SECONDS)}, STATION)
    alone_s = STATION.prepare_s + STATION.seconds(1)
    assert len(ways) == 20 * SECONDS
    assert [way.latency_s for way in ways] == pytest.approx([alone_s] * len(ways))


def test_time_between_two_calls_is_time_lost() -> None:
    station = Station(STATION.service_s, STATION.prepare_s, between_s=0.002)
    ways = overload(LANES, station)
    assert len(ways) / SECONDS == pytest.approx(16 / (0.008 + 0.002), rel=0.02)
