"""Where the time of an event went."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.core import HistogramMetricFamily

from consumers.budget import BatchTimes, LatencyBudget, timing_header
from consumers.records import Record
from schemas.timing import STAGES, TIMING_HEADER, encode_timing, parse_timing

LANE = "realtime"


def record(appended_us: int, polled_us: int) -> Record:
    return Record(LANE, ("t", 0), 0, None, b"", (), appended_us, polled_us)


def families(budget: LatencyBudget) -> dict[str, HistogramMetricFamily]:
    return {family.name: family for family in budget.collect()}


def samples(family: HistogramMetricFamily, suffix: str, **labels: str) -> dict[str, float]:
    """By the bucket's edge, or under "" for the sum."""
    return {
        one.labels.get("le", ""): one.value
        for one in family.samples
        if one.name == family.name + suffix and labels.items() <= one.labels.items()
    }


@given(
    passed=st.lists(
        st.lists(st.integers(0, 40_000_000), min_size=6, max_size=6).map(sorted), max_size=5
    )
)
def test_stages_add_up_to_the_whole(passed: list[list[int]]) -> None:
    """Every feature counts once in each stage, and no microsecond is lost between them."""
    budget = LatencyBudget([LANE, "other"])
    for appended, polled, taken, given_, answered, durable in passed:
        times = BatchTimes(taken, given_, answered)
        budget.observe(LANE, [record(appended, polled)] * 2, times, durable)
    of = families(budget)
    whole, by_stage = of["tapeline_latency_seconds"], of["tapeline_stage_seconds"]
    counts = samples(whole, "_bucket", lane=LANE)
    assert counts["+Inf"] == 2 * len(passed)
    for edge, count in counts.items():
        latencies = [(times[-1] - times[0]) / 1e6 for times in passed]
        assert count == 2 * sum(latency <= float(edge) for latency in latencies)
    sums = [samples(by_stage, "_sum", lane=LANE, stage=stage)[""] for stage in STAGES]
    assert sum(sums) == pytest.approx(samples(whole, "_sum", lane=LANE)[""])
    for stage, (begun, ended) in zip(STAGES, pairwise(range(6)), strict=True):
        expected = sum(2 * (times[ended] - times[begun]) / 1e6 for times in passed)
        assert samples(by_stage, "_sum", lane=LANE, stage=stage)[""] == pytest.approx(expected)
        assert samples(by_stage, "_bucket", lane=LANE, stage=stage)["+Inf"] == 2 * len(passed)
    assert samples(whole, "_bucket", lane="other")["+Inf"] == 0


def test_parcel_without_features_counts_nothing() -> None:
    budget = LatencyBudget([LANE])
    budget.observe(LANE, [], BatchTimes(1, 2, 3), 4)
    assert samples(families(budget)["tapeline_latency_seconds"], "_bucket")["+Inf"] == 0


def test_header_says_milliseconds_by_stage() -> None:
    name, value = timing_header(record(1_000, 3_500), BatchTimes(4_000, 4_000, 14_000))
    assert name == TIMING_HEADER
    assert value == b"broker;dur=2.500, queue;dur=0.500, batch;dur=0.000, model;dur=10.000"
    assert parse_timing(value) == {"broker": 2.5, "queue": 0.5, "batch": 0.0, "model": 10.0}


@given(st.binary())
def test_any_header_can_be_read(value: bytes) -> None:
    assert all(isinstance(ms, float) for ms in parse_timing(value).values())


@given(st.dictionaries(st.sampled_from(STAGES), st.floats(-1e6, 1e6)))
def test_timing_survives_its_way(stages_ms: dict[str, float]) -> None:
    assert parse_timing(encode_timing(stages_ms)) == pytest.approx(stages_ms, abs=0.0006)
