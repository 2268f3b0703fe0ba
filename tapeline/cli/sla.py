"""``tapeline sla``: are the promises kept."""

from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import ConfigError
from tapeline.cli.terminal import JsonOption, given_settings, out, print_json, print_table


def sla(
    ctx: typer.Context,
    report: Annotated[Path | None, typer.Argument(help="Of `tapeline bench ... --out`.")] = None,
    prometheus: Annotated[
        str | None, typer.Option(help="Instead: where Prometheus answers, http://HOST:9090.")
    ] = None,
    over: Annotated[str, typer.Option(help="With --prometheus: how far back.")] = "15m",
    lane: Annotated[str, typer.Option(help="With --prometheus: which lane.")] = "realtime",
    json: JsonOption = False,
) -> None:
    """Check the promises of the settings (sla.*) against what was measured.

    Exit 0 only if every one is kept: what was not measured is unknown, and that is no pass.
    """
    from tapeline.bench.report import BenchReport
    from tapeline.sla.rules import Verdict, advise, check, verdict
    from tapeline.sla.sources import from_prometheus, from_report

    if (report is None) == (prometheus is None):
        raise ConfigError("give a report of `tapeline bench ... --out`, or --prometheus URL")
    if prometheus:
        figures = from_prometheus(prometheus.rstrip("/"), over, lane)
    else:
        assert report
        figures = from_report(BenchReport.read(report))
    checks = check(figures, given_settings(ctx).sla)
    advice, whole = advise(figures, checks), verdict(checks)
    if json:
        print_json({"verdict": whole, "checks": checks, "advice": advice})
    else:
        print_table(
            ("promise", "limit", "measured", "verdict", ""),
            [
                (one.name, f"{one.limit:g}", _shown(one.value), str(one.verdict), one.note)
                for one in checks
            ],
        )
        for one in advice:
            out().print(f"{one.evidence}: {one.what}", highlight=False)
        out().print(f"the promises are {whole}", highlight=False)
    if whole is not Verdict.KEPT:
        raise typer.Exit(1)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
