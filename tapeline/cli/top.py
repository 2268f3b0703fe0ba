"""``tapeline top``: a running processor at a glance."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError, TransientError
from tapeline.cli.terminal import JsonOption, cell, err, given_settings, out, print_json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tapeline.metrics.snapshot import Snapshot


def top(
    ctx: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(help="Of metrics.port; else http://127.0.0.1:PORT by the settings."),
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between looks.", min=1)] = 2,
    once: Annotated[bool, typer.Option("--once", help="One look, then end.")] = False,
    json: JsonOption = False,
) -> None:
    """Show lanes, lag, rates, latency, model, machines and replicas, live; Ctrl-C ends it.

    Asks every worker and replica itself; Prometheus is not needed. --json prints one look.
    """
    from rich.live import Live

    from tapeline.metrics.snapshot import Sampler

    sampler = Sampler(url or _default_url(ctx), given_settings(ctx).metrics.prometheus)
    if json:
        print_json(sampler.next())
    elif once:
        out().print(view(sampler.next()))
    else:
        with Live(view(sampler.next()), console=err(), screen=True) as live:
            while True:
                time.sleep(every)
                try:
                    live.update(view(sampler.next()))
                except TransientError as error:
                    live.console.set_window_title(str(error))


def _default_url(ctx: typer.Context) -> str:
    port = given_settings(ctx).metrics.port
    if not port:
        raise ConfigError(
            "metrics.port is not set: set TAPELINE_METRICS__PORT as for `tapeline run`, or give "
            "--url http://HOST:PORT"
        )
    return f"http://127.0.0.1:{port}"


def view(now: "Snapshot") -> "RenderableType":
    """A snapshot as tables."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.text import Text

    time_of_day = time.strftime("%H:%M:%S", time.localtime(now.at_s))
    model = now.model
    title = Text(f"tapeline  {time_of_day}  over {now.seconds:.1f} s", style="bold")
    title.append(f"   {' '.join(model.versions) or 'no model'}", style="cyan")
    if now.down:
        title.append(f"   no answer: {', '.join(now.down)}", style="bold red")
    lanes = _table(
        "lanes",
        ("lane", "events/s", "features/s", "p50 ms", "p95 ms", "p99 ms", "lag", "lag s", "queued",
         "in flight", "duplicates", "dead letters", ""),
        [
            (one.lane, one.events_per_s, one.features_per_s, one.p50_ms, one.p95_ms, one.p99_ms,
             one.lag_records, one.lag_s, one.queued, one.in_flight, one.duplicates,
             one.dead_letters, "paused" if one.paused else "")
            for one in now.lanes
        ],
    )  # fmt: skip
    at_the_model = _table(
        "model",
        ("asked/s", "windows/s", "calls/s", "windows a call", "p50 ms", "p99 ms", "errors",
         "cache hits"),
        [(model.asked_per_s, model.windows_per_s, model.calls_per_s, model.windows_a_call,
          model.p50_ms, model.p99_ms, _percent(model.errors), _percent(model.cache_hits))],
    )  # fmt: skip
    processes = _table(
        "processes",
        ("part", "where", "cpu %", "memory %", "gpu %", "gpu memory %", "partitions", "MB"),
        [
            (one.part, one.instance, one.cpu, one.memory, one.gpu, one.gpu_memory, one.partitions,
             one.resident_mb)
            for one in now.processes
        ],
    )  # fmt: skip
    states = [
        (name, ", ".join(f"{number} {state.lower()}" for state, number in sorted(by.items())),
         now.targets.get({"worker": "workers", "model": "replicas"}.get(name, name)))
        for name, by in now.replicas.items()
    ]  # fmt: skip
    replicas = _table("replicas", ("deployment", "now", "wanted"), states) if states else ""
    alerts = Text("\n".join(now.alerts or ()), style="bold red")
    if not now.alerts:
        alerts = Text("alerts unknown: metrics.prometheus" if now.alerts is None else "no alert")
    return Group(
        title, alerts, lanes, _stages(now.stages_ms), at_the_model, Columns([processes, replicas])
    )


def _stages(stages_ms: Any) -> "RenderableType":
    """The mean way of an event, each stage as wide as its time."""
    from rich.text import Text

    whole = sum(stages_ms.values())
    text = Text("where the time goes  ", style="bold")
    for (stage, ms), color in zip(stages_ms.items(), _COLORS, strict=False):
        text.append("█" * max(1, round(60 * ms / whole)) if whole else "", style=color)
        text.append(f" {stage} {ms:.1f} ms  ")
    return text if stages_ms else Text("where the time goes  no feature since the last look")


def _table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> "RenderableType":
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        numeric = any(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(value, digits=1) for value in row))
    return table


_COLORS = ("blue", "yellow", "magenta", "green", "red")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
