"""``tapeline worker``, ``run`` and ``demo``: the processor itself."""

import signal
import sys
import threading
from contextlib import redirect_stdout
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import ConfigError
from tapeline.cli.terminal import JsonOption, err, print_json, print_table, settings_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from consumers.metrics import LaneCounts, WorkerStatistics
    from tapeline.app import ServeApplication

_REFRESH_S = 1.0


def worker(ctx: typer.Context, json: JsonOption = False) -> None:
    """Run one worker, with the model, in this process; SIGTERM or Ctrl-C ends it in order.

    No Ray: for a laptop, a debugger, or a process manager of your own. Prints what became of every
    record when it ends. SIGHUP reads the settings again: shares, deadlines and limits may change.
    """
    import asyncio

    from consumers.logs import configure_logging
    from tapeline.app import check_surroundings, run_worker, total_counts

    settings = settings_of(ctx)
    configure_logging()
    check_surroundings(settings)
    statistics = asyncio.run(
        run_worker(
            settings,
            on_started=lambda: typer.echo("worker started", err=True),
            reload=lambda: settings_of(ctx),
        )
    )
    _show_counts(total_counts([statistics]), json)
    _demand_drained([statistics])


def run(ctx: typer.Context, json: JsonOption = False) -> None:
    """Deploy workers and model on Ray Serve, and stay; SIGTERM or Ctrl-C ends them in order.

    Joins the cluster of `serve.address` or $RAY_ADDRESS, or starts Ray on this machine. Prints
    what became of every record when it ends. SIGHUP reads the settings again: shares, deadlines and
    limits may change.
    """
    from tapeline.app import ServeApplication, check_surroundings, ray_session, total_counts

    settings = settings_of(ctx)
    check_surroundings(settings)
    with (
        redirect_stdout(sys.stderr),  # what Ray's processes say; the answer is ours alone
        err().status("starting Ray") as spinner,
        ray_session(settings) as address,
    ):
        ended, reloading = _event_of(signal.SIGTERM, signal.SIGINT), _event_of(signal.SIGHUP)
        spinner.update("deploying workers and model")
        application = ServeApplication(settings)
        application.deploy()
        err().print(f"running on Ray at {address}; Ctrl-C ends it")
        with application.metrics():
            while not ended.wait(_REFRESH_S):
                if reloading.is_set():
                    reloading.clear()
                    _reconfigure(application, ctx)
                if err().is_terminal:
                    counts = total_counts(application.statistics())
                    spinner.update(
                        f"{sum(lane.records for lane in counts.values()):,} events in, "
                        f"{sum(lane.features for lane in counts.values()):,} features out"
                    )
        spinner.update("finishing what is in flight")
        workers = application.drain()
        application.delete()
    _show_counts(total_counts(workers), json)
    _demand_drained(workers)


def demo(
    seconds: Annotated[float, typer.Option(help="How long events come.", min=1, max=60)] = 20,
    rate: Annotated[float, typer.Option(help="Events per second.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of the simulated market.")] = 0,
    json: JsonOption = False,
) -> None:
    """Show the whole processor on this machine alone: no Kafka, Redis, Java or GPU needed.

    Exit 1 if a single event is not accounted for.
    """
    from tapeline.demo import run_demo

    report = run_demo(seconds=seconds, rate_hz=rate, seed=seed, console=err())
    if json:
        print_json(report)
    else:
        report.print()
    if not report.is_complete:
        raise typer.Exit(1)


def _reconfigure(application: "ServeApplication", ctx: typer.Context) -> None:
    try:
        application.reconfigure(settings_of(ctx))
    except ConfigError as error:
        err().print(f"settings refused: {error}", markup=False)
    else:
        err().print("settings changed")


def _event_of(*numbers: signal.Signals) -> threading.Event:
    """Set by these signals from now on; Ray's own handlers would end us in the middle."""
    event = threading.Event()
    for number in numbers:
        signal.signal(number, lambda *_: event.set())
    return event


def _demand_drained(workers: "Sequence[WorkerStatistics]") -> None:
    """Exit 1 if work was left in flight: nothing is lost, but its next owner does it again."""
    if num_undrained := sum(worker.num_undrained for worker in workers):
        typer.echo(
            f"tapeline: {num_undrained} partitions were let go with work in flight, which is done "
            "again; see the log, or raise worker.drain_timeout_s",
            err=True,
        )
        raise typer.Exit(1)


def _show_counts(counts: "Mapping[str, LaneCounts]", json: bool) -> None:
    if json:
        print_json(counts)
        return
    from consumers.metrics import LaneCounts

    names = [field.name for field in fields(LaneCounts)]
    print_table(
        ("lane", *(name.replace("_", " ") for name in names)),
        [(lane, *(getattr(count, name) for name in names)) for lane, count in counts.items()],
        title="what became of every record",
    )
