"""Around the rules: rates from offsets, policies that hold, traces, and loads in virtual time."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import wait_until

from consumers.capacity import CapacityMeter
from schemas.autoscale import AutoscaleSettings
from schemas.errors import ConfigError, TransientError
from schemas.settings import Settings, load_settings
from tapeline.autoscale import observe
from tapeline.autoscale.observe import LoadMeter, Observation, Observer
from tapeline.autoscale.policy import LagPolicy, policy_settings
from tapeline.autoscale.replay import SCALERS, Load, Ours, made_up, play, recorded
from tapeline.autoscale.rules import Decision, LaneLoad
from tapeline.autoscale.trace import Entry, read, record, trace_path
from tapeline.lag import PartitionLag


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    others = ("market-data", "batch", "historical", "background")
    lanes: dict[str, Any] = {name: {"enabled": False} for name in others}
    return load_settings(
        lanes=lanes | {"realtime": {"drain_target_s": 5}},
        autoscale={"enabled": True, "period_s": 0.02, "stale_after_s": 0.3, "max_workers": 8},
        state_dir=tmp_path,
    )


def at(end: int, lag: int, partition: int = 0) -> PartitionLag:
    return PartitionLag("realtime", "t", partition, end - lag, 0, end, lag)


# Rates.


def test_rates_come_from_differences_and_lags_from_the_last_look(settings: Settings) -> None:
    meter = LoadMeter(settings)
    assert meter.look([at(1000, 10), at(500, 0, 1)], 0.0) == (LaneLoad("realtime", 0.0, 10, 5, 1),)
    assert meter.look([at(1200, 20), at(500, 0, 1)], 2.0) == (
        LaneLoad("realtime", 100.0, 20, 5, 1),
    )
    (load,) = meter.look([at(1200, 0), at(540, 5, 1)], 4.0)
    assert load.rate == pytest.approx(60 + 8)  # 40 % of the newest, 60 % of what was
    assert (load.lag, load.num_busy) == (5, 2)


def test_a_topic_made_anew_gives_no_wild_rate_and_silence_ends_in_zero(settings: Settings) -> None:
    meter = LoadMeter(settings)
    meter.look([at(1_000_000, 0)], 0.0)
    assert meter.look([at(10, 10)], 2.0)[0].rate == 0.0
    assert meter.look([at(30, 0)], 4.0)[0].rate == 10.0
    for look in range(40):
        (load,) = meter.look([at(30, 0)], 6.0 + 2 * look)
    assert (load.rate, load.num_busy) == (0.0, 0)


# The observer.


class Reader:
    """Stands for the broker: the test says what each look gives."""

    def __init__(self, answers: list[Any]) -> None:
        self.answers = answers
        self.num_closed = 0

    def read(self) -> list[PartitionLag]:
        self.ended_s = time.monotonic()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.num_closed += 1


def test_the_last_good_look_stays_whatever_goes_wrong(settings: Settings) -> None:
    reader = Reader([[at(10, 1)], TransientError("away"), RuntimeError("a bug"), [at(20, 2)]])
    observer = Observer(settings, lambda _: reader)  # type: ignore[arg-type,return-value]
    try:
        wait_until(lambda: (observer.latest()[0] or _NONE).number >= 2, 10, "two good looks")
        observation, error = observer.latest()
        assert observation is not None
        assert observation.lanes[0].lag == 2
        assert error is None
        assert observer.num_errors == 2
        assert reader.num_closed == 2, "it connects again after each"
    finally:
        observer.stop()


_NONE = Observation(0, 0.0, ())


def test_an_observer_that_nobody_asks_ends(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its application was deleted: Serve drops a policy without a word."""
    monkeypatch.setattr(observe, "_ABANDONED_AFTER_S", 0.2)
    reader = Reader([[at(10, 1)]])
    observer = Observer(settings, lambda _: reader)  # type: ignore[arg-type,return-value]
    wait_until(lambda: observer._last, 10, "a look")
    wait_until(lambda: not observer.is_looking, 10, "its end")
    assert reader.num_closed == 1


# The policy.


class Context:
    """What Serve hands to a policy, as far as ours looks at it."""

    def __init__(self, target: int, capacity: dict[str, float] | None = None) -> None:
        self.target_num_replicas = self.current_num_replicas = target
        self.policy_state: dict[str, Any] = {}
        self.aggregated_metrics = {"capacity_per_s": capacity or {}}


class Seen:
    """An observer of which the test says what it saw."""

    def __init__(self) -> None:
        self.observation: Observation | None = None
        self.error: str | None = "no broker answers"

    def latest(self) -> tuple[Observation | None, str | None]:
        return self.observation, self.error

    def see(self, number: int, *lanes: LaneLoad, age_s: float = 0.0) -> None:
        self.observation = Observation(number, time.monotonic() - age_s, lanes)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def policy_of(settings: Settings, role: Any, seen: Seen) -> LagPolicy:
    """As Serve makes it, from JSON."""
    given = json.loads(json.dumps(policy_settings(settings)))
    return LagPolicy(given, role, observer=seen)  # type: ignore[arg-type]


def test_a_policy_decides_once_a_look_and_remembers(settings: Settings, seen: Seen) -> None:
    policy = policy_of(settings, "workers", seen)
    context = Context(2, {"a": 100.0, "b": 300.0})  # 200 each
    seen.see(1, LaneLoad("realtime", 0.0, 0, 5, 0))
    assert policy(context)[0] == 2, "there are no rates yet"
    seen.see(2, LaneLoad("realtime", 1000.0, 0, 5, 16))
    target, context.policy_state = policy(context)
    assert target == 7
    context.target_num_replicas = 7
    for _ in range(5):  # the controller asks ten times a second
        target, context.policy_state = policy(context)
        assert target == 7
    entries = list(read(trace_path(settings)))
    assert [(one.role, one.decision.target if one.decision else None) for one in entries] == [
        ("workers", 7)
    ]
    assert entries[0].decision is not None
    assert "1000/s to do" in entries[0].decision.why


def test_capacity_is_assumed_until_it_is_measured(settings: Settings, seen: Seen) -> None:
    seen.see(2, LaneLoad("realtime", 3000.0, 0, 5, 16))
    assert policy_of(settings, "workers", seen)(Context(1))[0] == 2  # 2000 each
    assert policy_of(settings, "replicas", seen)(Context(1))[0] == 4  # 1000 each


@pytest.mark.parametrize("role", ["workers", "replicas"])
def test_a_policy_holds_when_nothing_is_known(settings: Settings, seen: Seen, role: Any) -> None:
    policy = policy_of(settings, role, seen)
    for target in (3, 3):
        assert policy(Context(target))[0] == target
    seen.see(5, LaneLoad("realtime", 10.0**6, 0, 5, 16), age_s=1.0)
    seen.error = "the topic does not exist"
    assert policy(Context(3))[0] == 3
    held = [one.held for one in read(trace_path(settings))]
    assert held == ["no broker answers", "the topic does not exist"], "once for each reason"


def test_a_policy_never_raises(settings: Settings, seen: Seen) -> None:
    policy = policy_of(settings, "workers", seen)
    seen.see(2, LaneLoad("realtime", float("nan"), 0, 5, 16))
    assert policy(Context(3))[0] == 3
    context = Context(3)
    context.policy_state = {"memory": {"unknown": 1}}
    seen.see(3, LaneLoad("realtime", 1.0, 0, 5, 16))
    assert policy(context)[0] == 3


def test_a_trace_that_cannot_be_written_harms_nothing(settings: Settings, seen: Seen) -> None:
    trace_path(settings).mkdir()
    policy = policy_of(settings, "workers", seen)
    seen.see(2, LaneLoad("realtime", 10_000.0, 0, 5, 16))
    assert policy(Context(1))[0] == 7


# Traces.


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    lanes = (LaneLoad("realtime", 1.5, 2, 10, 3),)
    entries = [
        Entry(1.0, "workers", 2, lanes, Decision(3, 3, 2, 1.7, 100.0, 0.0, "up")),
        Entry(2.0, "replicas", 2, (), None, held="no broker answers"),
    ]
    for entry in entries:
        record(tmp_path / "a" / "trace.jsonl", entry)
    assert list(read(tmp_path / "a" / "trace.jsonl")) == entries


@pytest.mark.parametrize("line", ["", "{}", "[]", '{"lanes": 3}', '{"lanes": [], "decision": {}}'])
def test_a_line_that_is_no_decision_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "trace.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError, match="line 1 is no decision"):
        list(read(tmp_path / "trace.jsonl"))
    with pytest.raises(ConfigError, match=r"autoscale\.enabled"):
        list(read(tmp_path / "none.jsonl"))


# Virtual time.


def run(new: Callable[..., Any], load: Load, **changes: Any) -> Any:
    settings = AutoscaleSettings(max_workers=10, **changes)
    return play(load, new(settings, 100.0), settings, capacity=100.0, num_partitions=16)


def test_no_record_is_made_or_lost_in_virtual_time() -> None:
    load = made_up(100.0, 10)[1]
    for new in SCALERS:
        played = run(new, load)
        arrived = sum(one for one, _, _ in played.history)
        assert arrived == pytest.approx(
            sum(float(series.sum()) for series in load.arrivals.values())
        )
        assert len(played.history) == load.num_seconds
        assert played.replica_s >= load.num_seconds  # one at least, always
        assert played.replica_s == sum(number for _, _, number in played.history)


def test_ours_is_never_late_where_lateness_can_be_helped() -> None:
    loads = made_up(100.0, 10)
    for load in loads[:3]:
        ours = run(Ours, load)
        assert ours.late_s == 0, load.name
        assert ours.turns <= 30, load.name
        others = [run(new, load) for new in SCALERS[1:]]
        assert ours.late_s <= min(one.late_s for one in others)
        in_time = [one for one in others if not one.late_s]
        assert all(ours.replica_s < one.replica_s for one in in_time)


def test_a_step_is_answered_by_one_change_of_direction() -> None:
    step = np.concatenate([np.full(300, 50.0), np.full(600, 500.0), np.full(900, 50.0)])
    played = run(Ours, Load("step", {"realtime": step}))
    assert played.turns <= 1
    numbers = [number for _, _, number in played.history]
    assert numbers[299] == 1
    assert numbers[304] > 1, "decided within two periods"
    assert numbers[320] >= 7
    assert numbers[-1] == 1


def test_a_recorded_trace_becomes_a_load() -> None:
    lane = LaneLoad("realtime", 10.0, 50, 10, 1)
    entries = [
        Entry(100.0, "workers", 1, (lane,), None),
        Entry(100.0, "replicas", 1, (lane,), None),
        Entry(104.0, "workers", 1, (replace(lane, rate=30.0, lag=0),), None),
        Entry(106.0, "workers", 1, (lane,), None),
    ]
    load = recorded("x", iter(entries))
    assert load.arrivals["realtime"].tolist() == [60, 10, 10, 10, 30, 30, 0]
    with pytest.raises(ConfigError, match="fewer than two looks"):
        recorded("x", iter(entries[:2]))


# Capacity.


def test_capacity_is_records_by_processor_time_within_what_the_model_allows() -> None:
    meter = CapacityMeter()
    assert meter.per_s(in_flight=2, service_s={}) is None
    meter.observe(100, 1.0)  # too few
    meter.observe(1000, 0.5)
    assert meter.per_s(in_flight=2, service_s={}) == 2000
    meter.observe(2000, 1.5)  # slower: 1000
    assert meter.per_s(in_flight=2, service_s={}) == pytest.approx(1700)
    assert meter.per_s(in_flight=2, service_s={4: 0.02, 8: 0.02}) == 800


def test_bounds_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"min_workers \(5\) must not be above max_workers \(4\)"):
        load_settings(autoscale={"min_workers": 5})
    with pytest.raises(ConfigError, match="stale_after_s must be longer than period_s"):
        load_settings(autoscale={"stale_after_s": 1})
