"""The open loop shows a stall that a closed one hides; reports come back as they were written."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import ConfigError, TransientError
from tapeline.bench.html import write_html
from tapeline.bench.loops import Outcome, arrivals, closed_loop, is_overwhelmed, open_loop
from tapeline.bench.report import BenchReport, Step, by_second, summary

RATE_HZ, SECONDS, STALL_S = 200.0, 1.0, 0.4


class Stalls:
    """Answers at once, but for one stall in which it answers nobody."""

    def __init__(self, at: int) -> None:
        self._at = at
        self._ready = asyncio.Event()
        self._ready.set()

    async def request(self, number: int) -> None:
        if number == self._at:
            self._ready.clear()
            await asyncio.sleep(STALL_S)
            self._ready.set()
        await self._ready.wait()


def nothing(_: float) -> None:
    """Nobody looks."""


def test_arrivals_are_poisson_and_the_seed_s() -> None:
    times = list(arrivals(50, 200, seed=4))
    assert times == list(arrivals(50, 200, seed=4)) != list(arrivals(50, 200, seed=5))
    gaps = np.diff(times)
    assert len(times) == pytest.approx(10_000, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)  # an exponential's
    assert max(times) < 200


def test_a_stall_is_in_the_open_loop_s_percentiles_and_hidden_in_the_closed_one_s() -> None:
    async def both() -> tuple[list[Outcome], list[Outcome]]:
        due = arrivals(RATE_HZ, SECONDS, seed=1)
        return (
            await open_loop(Stalls(at=60), due, 10, nothing),
            await closed_loop(Stalls(at=60), SECONDS, 10, nothing),
        )

    opened, closed = asyncio.run(both())
    waited = [one for one in opened if one.latency_s > STALL_S / 4]
    assert len(waited) > RATE_HZ * STALL_S / 2  # three quarters of those due in the stall
    assert np.quantile([one.latency_s for one in opened], 0.9) > STALL_S / 4
    assert sum(one.latency_s > STALL_S / 4 for one in closed) < len(waited) / 4
    assert np.quantile([one.latency_s for one in closed], 0.9) < STALL_S / 4


def test_failures_and_late_answers_are_counted_by_why() -> None:
    class Fails:
        async def request(self, number: int) -> None:
            if number % 3 == 0:
                raise TransientError("the model is away")
            if number % 3 == 1:
                await asyncio.sleep(60)

    async def ask() -> list[Outcome]:
        return await open_loop(Fails(), iter([0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), 0.05, nothing)

    told = summary(asyncio.run(ask()), weight=10)
    assert told["asked"] == 60
    assert told["answered"] == 20
    assert told["errors"] == {"the model is away": 2, "no answer within 0.05 s": 2}
    assert told["availability"] == 0.0


def outcome(due_s: float, latency_s: float, error: str | None = None) -> Outcome:
    return Outcome(due_s, due_s, due_s + latency_s, error)


def test_a_queue_that_grows_is_too_much_and_a_slow_but_steady_answer_is_not() -> None:
    times = np.arange(0, 9, 0.1)
    assert is_overwhelmed([outcome(t, 0.5) for t in times], 9, 0.1) is None
    assert "at last" in (is_overwhelmed([outcome(t, 0.1 + t / 5) for t in times], 9, 0.1) or "")
    failing = [outcome(t, 0.1, "no" if i % 5 == 0 else None) for i, t in enumerate(times)]
    assert is_overwhelmed(failing, 9, 0.1) == "20% of the requests failed"


def test_seconds_are_by_when_requests_were_due() -> None:
    found = by_second([outcome(0.2, 1.5), outcome(0.9, 0.5), outcome(1.1, 0.1, "no")])
    assert [(one.second, one.asked, one.answered) for one in found] == [(0, 2, 2), (1, 1, 0)]
    assert found[0].p50_ms == pytest.approx(1000)
    assert found[1].p50_ms is None


def report() -> BenchReport:
    outcomes = [outcome(i / 100, 0.01 + i / 10_000) for i in range(300)]
    return BenchReport(
        kind="stress",
        target="pipeline",
        machine="a <machine>",
        at="2024-01-01T00:00:00+00:00",
        options={"seed": 0},
        steps=[Step(100, 99.0, 1.0, None, 0.2, "20% of the requests failed")],
        stages_ms={"model": 3.0, "publish": 2.0},
        **summary(outcomes),
    )


def test_a_report_comes_back_as_it_was_written(tmp_path: Path) -> None:
    report().write(tmp_path / "report.json")
    again = BenchReport.read(tmp_path / "report.json")
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "report.json").read_text()
    assert again.steps == report().steps
    assert again.seconds == report().seconds


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1}', "[]", '{"format": 9, "asked": 1}'])
def test_what_is_no_report_is_said_to_be_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ConfigError, match="is no report of `tapeline bench"):
        BenchReport.read(tmp_path / "other.json")


def test_the_page_stands_alone(tmp_path: Path) -> None:
    write_html(report(), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") == 4
    assert "a &lt;machine&gt;" in page
    assert "20% of the requests failed" in page
    for outside in ("<script", "src=", "@import", "<link"):
        assert outside not in page
