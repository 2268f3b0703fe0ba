"""A report as one HTML file that needs nothing else: figures, tables, plots."""

import html
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from tapeline.bench.report import BenchReport

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
body { color: #1c2733 } h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #dfe4ea }
th:first-child, td:first-child { text-align: left } th { font-weight: 500; color: #6b7885 }
svg { max-width: 100%; height: auto }
"""


def write_html(report: BenchReport, path: Path) -> None:
    """Writes it. Raises ConfigError: matplotlib is missing, or the file cannot be written."""
    options = ", ".join(f"{name} {value}" for name, value in report.options.items())
    parts = [
        f"<h1>Tapeline bench: {report.kind} of the {report.target}</h1>",
        f"<p>{html.escape(report.machine)}<br>{report.at}<br>{html.escape(options)}</p>",
        _table(("", "value"), _figures(report)),
        *_plots(report),
    ]
    if report.steps:
        rows = [
            (f"{one.rate_hz:,.0f}", one.answered_per_s, one.p50_ms, one.p99_ms,
             f"{one.errors:.1%}", one.too_much or "")
            for one in report.steps
        ]  # fmt: skip
        parts.append("<h2>Rates</h2>")
        parts.append(_table(("asked/s", "answered/s", "p50 ms", "p99 ms", "errors", ""), rows))
    if report.errors:
        parts.append("<h2>Errors</h2>" + _table(("why", "how many"), report.errors.items()))
    document = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tapeline bench</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    try:
        path.write_text(document)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def _figures(report: BenchReport) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [
        ("asked", report.asked),
        ("answered", report.answered),
        ("answered a second", report.per_s),
        ("availability", f"{report.availability:.2%}"),
        ("sent late, p99 ms", report.late_ms),
    ]
    rows += [(f"latency {name}, ms", value) for name, value in report.latency_ms.items()]
    if report.windows_a_call is not None:
        rows.append(("windows a micro-batch", report.windows_a_call))
    return rows + [(f"{name}, highest %", value) for name, value in report.use_percent.items()]


def _table(columns: Sequence[str], rows: Any) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_shown(value))}</td>" for value in row) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return (
        f"{value:,.2f}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _plots(report: BenchReport) -> list[str]:
    seconds = [one.second for one in report.seconds]

    def percentiles(axes: Any) -> None:
        points = [(1 - share, ms) for share, ms in report.quantiles if share < 1]
        axes.plot([one[0] for one in points], [one[1] for one in points], marker=".")
        axes.set(xscale="log", xlabel="share of requests that were slower", ylabel="ms")
        axes.invert_xaxis()

    def over_time(axes: Any) -> None:
        axes.plot(seconds, [one.p50_ms for one in report.seconds], label="p50")
        axes.plot(seconds, [one.p99_ms for one in report.seconds], label="p99")
        axes.set(xlabel="second", ylabel="ms")
        axes.legend()

    def throughput(axes: Any) -> None:
        axes.plot(seconds, [one.asked for one in report.seconds], label="due")
        axes.plot(seconds, [one.answered for one in report.seconds], label="of these answered")
        axes.set(xlabel="second", ylabel="requests", ylim=(0, None))
        axes.legend()

    def stages(axes: Any) -> None:
        left = 0.0
        for stage, ms in report.stages_ms.items():
            axes.barh([""], [ms], left=left, label=f"{stage} {ms:.1f}")
            left += ms
        axes.set(xlabel="mean ms of a feature")
        axes.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.45), frameon=False)

    drawn = [
        ("Latency: how slow the slowest were", percentiles, 3.2),
        ("Latency over time, by when a request was due", over_time, 3.2),
        ("Throughput", throughput, 3.2),
    ]
    if report.stages_ms:
        drawn.append(("Where the time goes", stages, 1.8))
    return [f"<h2>{title}</h2>{_svg(draw, height)}" for title, draw, height in drawn]


def _svg(draw: Callable[[Any], None], height: float) -> str:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "plots need matplotlib: `pip install matplotlib`, or leave --html out"
        ) from error
    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
