"""Promises: kept, broken, or unknown; and whose fault it is."""

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from schemas.errors import ConfigError
from schemas.settings import load_settings
from schemas.sla import SlaSettings
from tapeline.bench.report import BenchReport, Second
from tapeline.cli import app
from tapeline.sla.rules import Check, Figures, Verdict, advise, check, verdict

SLA = SlaSettings()
GOOD = Figures(
    latency_ms={"p50": 50, "p95": 80, "p99": 100, "max": 200},
    asked_per_s=600,
    per_s=500,
    availability=0.999,
    errors=0.01,
    use_percent={"cpu": 80, "memory": 85},
    stages_ms={"broker": 1, "queue": 9, "batch": 2, "model": 6, "publish": 2},
)


def verdicts(figures: Figures) -> dict[str, Verdict]:
    return {one.name: one.verdict for one in check(figures, SLA)}


def test_figures_at_their_limits_keep_every_promise() -> None:
    checks = check(GOOD, SLA)
    assert verdict(checks) is Verdict.KEPT
    assert not advise(GOOD, checks)
    assert "gpu, %" not in verdicts(GOOD)


def test_what_was_not_measured_is_unknown_and_no_pass() -> None:
    assert set(verdicts(Figures(has_gpu=True)).values()) == {Verdict.UNKNOWN}
    assert len(verdicts(Figures(has_gpu=True))) == 12
    for missing in ("availability", "errors", "per_s"):
        checks = check(replace(GOOD, **{missing: None}), SLA)
        assert verdict(checks) is Verdict.UNKNOWN, missing


@pytest.mark.parametrize(
    ("worse", "name"),
    [
        ({"latency_ms": {**GOOD.latency_ms, "p95": 80.1}}, "latency p95, ms"),
        ({"availability": 0.9989}, "availability"),
        ({"errors": 0.011}, "errors"),
        ({"use_percent": {"cpu": 81, "memory": 1}}, "cpu, %"),
        ({"per_s": 499.0}, "features/s, peak"),
    ],
)
def test_each_promise_can_be_broken_alone(worse: dict[str, object], name: str) -> None:
    figures = replace(GOOD, **worse)  # type: ignore[arg-type]
    checks = check(figures, SLA)
    assert {one.name for one in checks if one.verdict is Verdict.BROKEN} == {name}
    assert verdict(checks) is Verdict.BROKEN
    assert advise(figures, checks)


def test_a_rate_that_was_not_asked_for_says_nothing() -> None:
    found = verdicts(replace(GOOD, asked_per_s=60, per_s=60))
    assert found["features/s, least"] is Verdict.KEPT
    assert found["features/s, promised"] is Verdict.UNKNOWN
    assert verdicts(replace(GOOD, asked_per_s=300, per_s=60))["features/s, promised"] is (
        Verdict.BROKEN
    )


@pytest.mark.parametrize("stage", ["broker", "queue", "batch", "model", "publish"])
def test_the_slowest_stage_is_the_guilty_one(stage: str) -> None:
    figures = replace(GOOD, latency_ms={"p50": 900}, stages_ms={**GOOD.stages_ms, stage: 800.0})
    [advice] = advise(figures, check(figures, SLA))
    assert f"stage {stage} takes 800.0 of" in advice.evidence


def test_promises_must_not_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="p50_ms, p95_ms, p99_ms, max_ms must not fall"):
        load_settings(sla={"p99_ms": 10})


def test_the_command_says_it_by_its_exit_code(tmp_path: Path) -> None:
    report = BenchReport(
        kind="load", target="pipeline", machine="m", at="t", options={}, asked=6_000,
        answered=6_000, per_s=600, latency_ms=GOOD.latency_ms, quantiles=[], late_ms=1,
        availability=1, errors={}, seconds=[Second(n, 600, 600, 1, 2) for n in range(10)],
        stages_ms=GOOD.stages_ms, use_percent=GOOD.use_percent,
    )  # fmt: skip
    path = tmp_path / "report.json"
    report.write(path)
    assert told(path) == (0, "the promises are kept")
    replace(report, use_percent={}).write(path)
    assert told(path) == (1, "the promises are unknown")
    replace(report, answered=3_000, errors={"no answer within 10 s": 3_000}).write(path)
    assert told(path) == (1, "the promises are broken")
    assert CliRunner().invoke(app, ["sla"]).exit_code == 2


def told(path: Path) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["sla", str(path)])
    return done.exit_code, done.output.strip().splitlines()[-1]


def test_checks_name_each_promise_once() -> None:
    names = [one.name for one in check(GOOD, SLA)]
    assert len(set(names)) == len(names)
    assert all(isinstance(one, Check) for one in check(GOOD, SLA))
