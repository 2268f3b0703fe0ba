"""``tapeline bench``: load of our own on a running processor or a model, and what came of it."""

import asyncio
import datetime
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from schemas.errors import TapelineError
from tapeline.cli.terminal import JsonOption, err, out, print_json, print_table, settings_of

if TYPE_CHECKING:
    from schemas.settings import Settings
    from tapeline.bench.loops import Outcome, Progress, Target
    from tapeline.bench.report import BenchReport
    from tapeline.metrics.scrape import Scrape
    from tapeline.metrics.snapshot import Snapshot

    Ask: TypeAlias = Callable[[Target, float, Progress], Awaitable[list[Outcome]]]

app = typer.Typer(
    help="Put load on a running processor or a model, and measure it.", no_args_is_help=True
)


class _Of(StrEnum):
    PIPELINE = "pipeline"
    DEPLOYMENT = "deployment"


OfOption = Annotated[
    _Of, typer.Option("--of", help="The whole pipeline, or the model on Ray Serve alone.")
]
SecondsOption = Annotated[float, typer.Option(help="How long it is measured.", min=1)]
WarmUpOption = Annotated[float, typer.Option(help="Seconds before, not counted.", min=0)]
SeedOption = Annotated[int, typer.Option(help="Of arrivals, events and windows.")]
LaneOption = Annotated[str, typer.Option(help="Of --of pipeline.")]
SymbolsOption = Annotated[int, typer.Option(help="Of --of pipeline.", min=1)]
WindowsOption = Annotated[int, typer.Option(help="A request, of --of deployment.", min=1)]
TimeoutOption = Annotated[float, typer.Option(help="Then a request has failed.", min=0.1)]
OutOption = Annotated[Path | None, typer.Option("--out", help="Write the report there, JSON.")]
HtmlOption = Annotated[Path | None, typer.Option(help="And there, with plots; one file.")]


@dataclass(frozen=True, slots=True)
class _Options:
    of: _Of
    seconds: float
    warm_up: float
    seed: int
    lane: str
    symbols: int
    windows: int
    timeout: float

    @property
    def weight(self) -> int:
        """Windows or events in a request."""
        return 1 if self.of is _Of.PIPELINE else self.windows

    def told(self, **more: object) -> dict[str, Any]:
        """What a report repeats."""
        mine = {"lane": self.lane, "symbols": self.symbols}
        if self.of is _Of.DEPLOYMENT:
            mine = {"windows_a_request": self.windows}
        return {"seconds": self.seconds, "seed": self.seed, **mine, **more}


@app.command()
def latency(
    ctx: typer.Context,
    of: OfOption = _Of.PIPELINE,
    seconds: SecondsOption = 10,
    warm_up: WarmUpOption = 2,
    seed: SeedOption = 0,
    lane: LaneOption = "realtime",
    symbols: SymbolsOption = 10,
    windows: WindowsOption = 1,
    timeout: TimeoutOption = 10,
    out_file: OutOption = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """One request at a time: what an answer takes when nothing else is asked."""
    from tapeline.bench.loops import closed_loop

    options = _Options(of, seconds, warm_up, seed, lane, symbols, windows, timeout)

    async def ask(target: "Target", for_s: float, progress: "Progress") -> "list[Outcome]":
        return await closed_loop(target, for_s, timeout, progress)

    _show(_run(ctx, "latency", options, ask, ask, options.told()), out_file, html, json)


@app.command()
def load(
    ctx: typer.Context,
    rate: Annotated[float, typer.Option(help="Requests a second, on average.", min=0.1)] = 100,
    of: OfOption = _Of.PIPELINE,
    seconds: SecondsOption = 20,
    warm_up: WarmUpOption = 3,
    seed: SeedOption = 0,
    lane: LaneOption = "realtime",
    symbols: SymbolsOption = 10,
    windows: WindowsOption = 1,
    timeout: TimeoutOption = 10,
    out_file: OutOption = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Requests at a set rate, whether or not they are answered (open loop).

    They arrive as a Poisson process. Latency counts from when a request was due, so a stall is in
    the percentiles of all that waited for it.
    """
    from tapeline.bench.loops import arrivals, open_loop

    options = _Options(of, seconds, warm_up, seed, lane, symbols, windows, timeout)

    async def ask(target: "Target", for_s: float, progress: "Progress") -> "list[Outcome]":
        return await open_loop(target, arrivals(rate, for_s, seed), timeout, progress)

    report = _run(ctx, "load", options, ask, ask, options.told(rate_hz=rate))
    _show(report, out_file, html, json)


@app.command()
def stress(
    ctx: typer.Context,
    rate: Annotated[float, typer.Option(help="The first, requests a second.", min=0.1)] = 100,
    factor: Annotated[float, typer.Option(help="From one rate to the next.", min=1.01)] = 1.3,
    max_errors: Annotated[float, typer.Option(help="More is too much.", min=0, max=1)] = 0.1,
    of: OfOption = _Of.PIPELINE,
    seconds: Annotated[float, typer.Option(help="Of each rate.", min=1)] = 8,
    warm_up: WarmUpOption = 3,
    seed: SeedOption = 0,
    lane: LaneOption = "realtime",
    symbols: SymbolsOption = 10,
    windows: WindowsOption = 1,
    timeout: TimeoutOption = 10,
    out_file: OutOption = None,
    html: HtmlOption = None,
    json: JsonOption = False,
) -> None:
    """Ever more requests, until errors or a growing queue say that it is too much.

    The report's figures are of the highest rate that was not.
    """
    from tapeline.bench.loops import arrivals, is_overwhelmed, open_loop
    from tapeline.bench.report import Step, step

    options = _Options(of, seconds, warm_up, seed, lane, symbols, windows, timeout)
    steps: list[Step] = []

    async def warm(target: "Target", for_s: float, progress: "Progress") -> "list[Outcome]":
        return await open_loop(target, arrivals(rate, for_s, seed), timeout, progress)

    async def ask(target: "Target", for_s: float, progress: "Progress") -> "list[Outcome]":
        best: list[Outcome] = []
        now_hz = rate
        while True:
            outcomes = await open_loop(target, arrivals(now_hz, for_s, seed), timeout, progress)
            too_much = is_overwhelmed(outcomes, for_s, max_errors)
            steps.append(step(options.weight * now_hz, outcomes, options.weight, too_much))
            err().print(f"{now_hz:,.0f}/s: {too_much or 'kept up'}", highlight=False)
            if too_much:
                return best or outcomes
            best, now_hz = outcomes, now_hz * factor

    told = options.told(first_rate_hz=rate, factor=factor, max_errors=max_errors)
    _show(_run(ctx, "stress", options, warm, ask, told, steps), out_file, html, json)


def _run(
    ctx: typer.Context,
    kind: str,
    options: _Options,
    warm: "Ask",
    ask: "Ask",
    told: dict[str, Any],
    steps: "list[Any] | None" = None,
) -> "BenchReport":
    from tapeline.bench.report import BenchReport, summary
    from tapeline.machine import this_machine
    from tapeline.metrics.snapshot import snapshot

    settings = settings_of(ctx)

    async def run() -> "tuple[list[Outcome], Snapshot | None]":
        async with _target(settings, options) as target:
            await warm(target, options.warm_up, lambda _: None)
            before = await asyncio.to_thread(_look, settings)
            with _progress(options.seconds) as progress:
                outcomes = await ask(target, options.seconds, progress)
            after = await asyncio.to_thread(_look, settings)
        return outcomes, snapshot(before, after) if before and after else None

    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with _session(settings, options):
        outcomes, seen = asyncio.run(run())
    return BenchReport(
        kind=kind,
        target=str(options.of),
        machine=str(this_machine()),
        at=at,
        options=told,
        steps=steps or [],
        **summary(outcomes, options.weight),
        **_seen_fields(seen),
    )


def _target(settings: "Settings", options: _Options) -> "AbstractAsyncContextManager[Target]":
    from tapeline.bench.targets import PipelineTarget, deployment_target

    if options.of is _Of.PIPELINE:
        return PipelineTarget(settings, options.lane, options.symbols, options.seed)
    return deployment_target(settings, options.windows, options.seed)


@contextmanager
def _session(settings: "Settings", options: _Options) -> Iterator[None]:
    if options.of is _Of.PIPELINE:
        yield
        return
    from tapeline.app import ray_session

    with ray_session(settings, log_to_driver=False):
        yield


def _look(settings: "Settings") -> "Scrape | None":
    """At the processor's metrics, if ``metrics.port`` is set."""
    from tapeline.metrics.scrape import scrape

    if not settings.metrics.port:
        return None
    try:
        return scrape(f"http://127.0.0.1:{settings.metrics.port}")
    except TapelineError as error:
        err().print(f"no metrics: {error}", highlight=False)
        return None


def _seen_fields(now: "Snapshot | None") -> dict[str, Any]:
    if not now:
        return {}
    use = {
        name: [value for one in now.processes if (value := getattr(one, name)) is not None]
        for name in ("cpu", "memory", "gpu")
    }
    return {
        "stages_ms": now.stages_ms,
        "windows_a_call": now.model.windows_a_call,
        "use_percent": {name: max(values) for name, values in use.items() if values},
    }


@contextmanager
def _progress(seconds: float) -> "Iterator[Progress]":
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("measuring"), BarColumn(), TimeRemainingColumn(), console=err(), transient=True
    )
    with bar:
        task = bar.add_task("", total=seconds)
        yield lambda passed_s: bar.update(task, completed=passed_s)


def _show(report: "BenchReport", out_file: Path | None, html: Path | None, json: bool) -> None:
    if out_file:
        report.write(out_file)
    if html:
        from tapeline.bench.html import write_html

        write_html(report, html)
    if json:
        print_json(report)
        return
    if report.steps:
        print_table(
            ("asked/s", "answered/s", "p50 ms", "p99 ms", "errors", ""),
            [(one.rate_hz, one.answered_per_s, one.p50_ms, one.p99_ms, f"{one.errors:.1%}",
              one.too_much or "") for one in report.steps],
        )  # fmt: skip
    latency = report.latency_ms
    print_table(
        ("asked", "answered", "answered/s", *(f"{name} ms" for name in latency), "sent late ms"),
        [(report.asked, report.answered, report.per_s, *latency.values(), report.late_ms)],
        title=f"{report.kind} of the {report.target}",
    )
    if report.stages_ms:
        print_table(tuple(report.stages_ms), [tuple(report.stages_ms.values())], "mean ms by stage")
    for why, number in report.errors.items():
        out().print(f"{number} x {why}", highlight=False)
    out().print(report.machine, highlight=False)
