"""``tapeline autoscale explain | replay``: why there are so many, and what else would have been."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import ConfigError
from tapeline.cli.terminal import JsonOption, given_settings, out, print_json, print_table

if TYPE_CHECKING:
    from tapeline.autoscale.trace import Entry

app = typer.Typer(help="See and try how workers and replicas scale.", no_args_is_help=True)


@app.command()
def explain(
    ctx: typer.Context,
    trace: Annotated[
        Path | None, typer.Option(help="Of `tapeline run`; else autoscale.trace.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Say why there are as many workers and model replicas as there are, by the last decision."""
    from tapeline.autoscale.rules import as_table
    from tapeline.autoscale.trace import last as last_of
    from tapeline.autoscale.trace import trace_path

    path = trace or trace_path(given_settings(ctx))
    last = last_of(path)
    if not last:
        raise ConfigError(f"{path} holds no decision yet; wait for autoscale.period_s")
    if json:
        print_json({role: asdict(entry) for role, entry in last.items()})
        return
    seen = next((entry for entry in last.values() if entry.lanes), None)
    if seen:
        rows = as_table(seen.lanes)
        print_table(
            ("lane", "events/s", "lag", "to be gone in s", "work/s", "busy partitions"),
            [tuple(row.values()) for row in rows],
        )
    print_table(
        ("of", "running", "target", "work/s", "capacity of one/s", "lag in s", "why"),
        [_row(entry) for entry in last.values()],
    )


@app.command()
def replay(
    ctx: typer.Context,
    trace: Annotated[
        Path | None, typer.Argument(help="What `tapeline run` recorded; else four made-up loads.")
    ] = None,
    capacity: Annotated[float, typer.Option(help="Events a second of one worker.", min=1)] = 2000,
    partitions: Annotated[int, typer.Option(help="Of each lane.", min=1)] = 16,
    plot: Annotated[Path | None, typer.Option(help="Draw it there, PNG or SVG.")] = None,
    json: JsonOption = False,
) -> None:
    """Play a trace in virtual time against these rules, a lag threshold, and Serve's own policy.

    Bounds, costs and targets are the settings' (autoscale.*).
    """
    from tapeline.autoscale import replay as world
    from tapeline.autoscale.trace import read

    settings = given_settings(ctx)
    autoscale = settings.autoscale
    drain_s = {
        lane.name: lane.drain_target_s for lane in settings.active_lanes if lane.drain_target_s
    }
    if trace:
        loads = [world.recorded(trace.name, read(trace))]
    else:
        loads = world.made_up(capacity, min(partitions, autoscale.max_workers))
    runs = [
        world.play(
            load, new(autoscale, capacity), autoscale,
            capacity=capacity, num_partitions=partitions, drain_s=drain_s,
        )
        for load in loads
        for new in world.SCALERS
    ]  # fmt: skip
    if plot:
        world.plot(runs, plot)
    header = ("load", "scaler", "replica-seconds", "s over the target", "oldest s", "changes",
              "turns")  # fmt: skip
    rows = [
        (one.load, one.scaler, round(one.replica_s), round(one.late_s), round(one.oldest_s),
         one.num_changes, one.turns)
        for one in runs
    ]  # fmt: skip
    if json:
        print_json([dict(zip(header, row, strict=True)) for row in rows])
        return
    print_table(header, rows)
    out().print(
        f"target {autoscale.drain_target_s:g} s, {capacity:g} events/s each, "
        f"{autoscale.min_workers} to {autoscale.max_workers}, {partitions} partitions a lane",
        highlight=False,
    )


def _row(entry: "Entry") -> tuple[object, ...]:
    decision = entry.decision
    if decision is None:
        return (entry.role, entry.running, "-", "-", "-", "-", f"held: {entry.held}")
    return (
        entry.role, entry.running, decision.target, round(decision.work, 1),
        round(decision.capacity), round(decision.lag_s, 1), decision.why,
    )  # fmt: skip
