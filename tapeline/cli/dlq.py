"""``tapeline dlq``: list, show, replay and purge dead letters."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tapeline.cli.letters import cut_message, iso, row_of, show_value, whole, write_raw
from tapeline.cli.terminal import JsonOption, count_progress, print_json, print_table, settings_of

if TYPE_CHECKING:
    from tapeline.dlq import Index, LetterId, Selection, State

app = typer.Typer(
    help="Dead letters: list, understand, send again, put away.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

IdsArgument = Annotated[
    list[str] | None, typer.Argument(metavar="ID", help="lane:partition:offset, as ls shows.")
]
LaneOption = Annotated[list[str] | None, typer.Option(help="Only this lane; may be given again.")]
StageOption = Annotated[
    list[str] | None, typer.Option(help="Only what this stage refused; may be given again.")
]
ReasonOption = Annotated[
    list[str] | None, typer.Option(help="Only with this reason; may be given again.")
]
SymbolOption = Annotated[
    list[str] | None, typer.Option(help="Only of this symbol (key); may be given again.")
]
SinceOption = Annotated[
    str | None, typer.Option(help="Failed then or later: 2024-08-08T12:00 (UTC), or 2h ago.")
]
UntilOption = Annotated[str | None, typer.Option(help="Failed before then; like --since.")]
AllOption = Annotated[bool, typer.Option("--all", help="Every letter, without a filter.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what it would do, change nothing.")
]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command()
def ls(
    ctx: typer.Context,
    lane: LaneOption = None,
    stage: StageOption = None,
    reason: ReasonOption = None,
    symbol: SymbolOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    limit: Annotated[int, typer.Option(min=0, help="Show so many, the newest; 0: all.")] = 50,
    json: JsonOption = False,
) -> None:
    """List dead letters, the newest first, and how many there are of each cause.

    State: open, replayed, purged; unreadable is a record that is no letter.
    """
    from tapeline.dlq import read_index, read_letters

    settings = settings_of(ctx)
    selection = _selection(None, lane, stage, reason, symbol, since, until)
    with count_progress("reading") as show:
        index = read_index(settings, selection, show)
    entries = sorted(index, key=lambda one: (one.failed_at_us, one.id), reverse=True)
    num_letters = len(entries)
    states = {one.id: one.state for one in (entries[:limit] if limit else entries)}
    letters = {one.id: one for one in read_letters(settings, states)}
    rows = [row_of(letters[id], state) for id, state in states.items() if id in letters]
    summary = _summary(index)
    if json:
        print_json({"num_letters": num_letters, "summary": summary, "letters": rows})
        return
    if rows:
        names = ("id", "failed_at", "lane", "stage", "reason", "attempts", "source", "state")
        print_table(
            [name.replace("_", " ") for name in (*names, "message")],
            [[*(row[name] for name in names), cut_message(row)] for row in rows],
            title=f"{len(rows):,} of {num_letters:,} dead letters, the newest first",
        )
    columns = ("lane", "stage", "reason", "open", "replayed", "purged", "unreadable")
    num_open = sum(one["open"] for one in summary)
    print_table(
        columns,
        [[one[name] for name in columns] for one in summary],
        title=f"{num_open:,} open of {num_letters:,}",
    )


@app.command()
def show(
    ctx: typer.Context,
    id: Annotated[str, typer.Argument(metavar="ID", help="lane:partition:offset, as ls shows.")],
    raw: Annotated[
        Path | None, typer.Option(help="Write the original's value, untouched, to this file.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show one dead letter whole: why it failed, its headers, its value.

    The value is shown as an event if it is one, else as hex. Exit 1 if there is no such letter.
    """
    from tapeline.dlq import LetterId, Selection, read_index, read_letters

    settings = settings_of(ctx)
    letter_id = LetterId.parse(id)
    index = read_index(settings, Selection(ids=frozenset((letter_id,))))
    states = {one.id: one.state for one in index}
    letter = next(read_letters(settings, states), None)
    if letter is None:
        typer.echo(f"tapeline: there is no letter {id}; see `tapeline dlq ls`", err=True)
        raise typer.Exit(1)
    shown = whole(settings, letter) | {"state": states[letter_id]}
    if raw is not None:
        write_raw(letter, raw)
    if json:
        print_json(shown)
        return
    for name, value in shown.items():
        if name == "headers":
            typer.echo("headers")
            for header, text in value:
                typer.echo(f"  {header}: {text}")
        elif name in ("event", "hex") and value is not None:
            show_value(name, value)
        elif value is not None:
            typer.echo(f"{name.replace('_', ' '):<12}{value}")


@app.command()
def replay(
    ctx: typer.Context,
    ids: IdsArgument = None,
    lane: LaneOption = None,
    stage: StageOption = None,
    reason: ReasonOption = None,
    symbol: SymbolOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was replayed before.")] = False,
    rate: Annotated[float | None, typer.Option(help="At most so many letters a second.")] = None,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Send open letters back to the topics that they came from, as they were.

    A letter is marked as replayed only after its replay is acknowledged. Ctrl-C ends it early and
    leaves the rest open. Exit 1 if a letter was not replayed.
    """
    from schemas.errors import ConfigError
    from tapeline.dlq import read_index, read_letters
    from tapeline.dlq import replay as replay_letters

    settings = settings_of(ctx)
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"--rate {rate:g} is no rate; give letters per second, above 0")
    selection = _selection(ids, lane, stage, reason, symbol, since, until)
    _check_chosen(selection, everything, "replay")
    with count_progress("reading") as show_read:
        index = read_index(settings, selection, show_read)
    chosen = index.ids("open", "replayed") if again else index.ids("open")
    missing = _missing(selection, index, chosen)
    result: dict[str, Any] = {"chosen": len(chosen), "missing": missing, "dry_run": dry_run}
    if not dry_run:
        if chosen and not yes:
            _ask(f"Replay {len(chosen):,} letters?")
        with count_progress("replaying") as show_done:
            report = replay_letters(
                settings,
                read_letters(settings, chosen),
                rate_hz=rate,
                progress=lambda num_done: show_done(num_done, len(chosen)),
            )
        result |= {
            "replayed": report.num_replayed,
            "unmarked": report.num_unmarked,
            "failed": report.num_failed,
            "left_open": len(chosen) - report.num_replayed + report.num_unmarked,
            "first_failures": report.first_failures,
            "interrupted": report.interrupted,
        }
    _finish(result, index, chosen, json)
    if result.get("interrupted") and not result["failed"]:
        raise typer.Exit(130)
    if missing or result.get("left_open"):
        raise typer.Exit(1)


@app.command()
def purge(
    ctx: typer.Context,
    ids: IdsArgument = None,
    lane: LaneOption = None,
    stage: StageOption = None,
    reason: ReasonOption = None,
    symbol: SymbolOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    everything: AllOption = False,
    replayed: Annotated[
        bool,
        typer.Option("--replayed", help="Delete replayed and purged letters from the broker."),
    ] = False,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Mark open letters as purged: nobody wants them again. They can still be listed and shown.

    With --replayed, what is replayed or purged is then deleted from the broker, from the beginning
    of each partition up to its first open letter; --lane alone then says where, and marks nothing.
    An unreadable record is marked only by its ID.
    """
    from tapeline.dlq import delete_closed, mark_purged, read_index

    settings = settings_of(ctx)
    selection = _selection(ids, lane, stage, reason, symbol, since, until)
    marks = everything or _narrows(selection) or (bool(lane) and not replayed)
    if not replayed:
        _check_chosen(selection, everything, "purge")
    if not (yes or dry_run) and not sys.stdin.isatty():
        from schemas.errors import ConfigError

        raise ConfigError("purge asks before it acts, and here is nobody to ask; give --yes")
    chosen: list[LetterId] = []
    missing: list[str] = []
    with count_progress("reading") as show_read:
        index = read_index(settings, selection, show_read)
    if marks:
        chosen = index.ids("open", "unreadable") if selection.ids else index.ids("open")
        missing = _missing(selection, index, chosen)
    lanes = sorted({*selection.lanes, *(id.lane for id in selection.ids)})
    result: dict[str, Any] = {"chosen": len(chosen), "missing": missing, "dry_run": dry_run}
    if not (yes or dry_run):
        deletes = "delete what is replayed or purged from the broker" if replayed else ""
        marking = f"mark {len(chosen):,} open letters as purged" if marks else ""
        question = " and ".join(filter(None, (marking, deletes)))
        _ask(f"{question.capitalize()}?")
    if not dry_run:
        result["marked"] = mark_purged(settings, chosen)
    if replayed:
        with count_progress("reading") as show_read:
            closing = frozenset(chosen) if dry_run else frozenset()
            deletion = delete_closed(
                settings, lanes, closing=closing, dry_run=dry_run, progress=show_read
            )
        result["would_delete" if dry_run else "deleted"] = deletion.num_records
        result["closed_kept"] = deletion.num_kept
    _finish(result, index, chosen, json)
    if missing:
        raise typer.Exit(1)


def _selection(
    ids: list[str] | None,
    lanes: list[str] | None,
    stages: list[str] | None,
    reasons: list[str] | None,
    symbols: list[str] | None,
    since: str | None,
    until: str | None,
) -> "Selection":
    """Raises ConfigError for IDs and filters together, and for what is neither ID nor time."""
    from schemas.errors import ConfigError
    from tapeline.dlq import LetterId, Selection
    from tapeline.reading import parse_time_us

    filters = (lanes, stages, reasons, symbols, since, until)
    if ids:
        if any(filters):
            raise ConfigError("IDs and filters are both given; give one of the two")
        return Selection(ids=frozenset(map(LetterId.parse, ids)))
    now_us = time.time_ns() // 1000
    return Selection(
        lanes=tuple(lanes or ()),
        stages=tuple(stages or ()),
        reasons=tuple(reasons or ()),
        symbols=tuple(symbols or ()),
        since_us=None if since is None else parse_time_us(since, now_us),
        until_us=None if until is None else parse_time_us(until, now_us),
    )


def _narrows(selection: "Selection") -> bool:
    """Whether it says which letters, and not just where."""
    by_cause = selection.stages or selection.reasons or selection.symbols
    return bool(selection.ids or by_cause) or selection.is_timed


def _check_chosen(selection: "Selection", everything: bool, command: str) -> None:
    from schemas.errors import ConfigError

    given = bool(selection.ids) or selection.has_filter
    if everything and given:
        raise ConfigError("--all stands for every letter; leave it out, or the IDs and filters")
    if not everything and not given:
        raise ConfigError(f"{command} which letters? Give IDs, a filter such as --lane, or --all")


def _missing(selection: "Selection", index: "Index", chosen: "list[LetterId]") -> list[str]:
    """Why each ID that was asked for is not chosen."""
    states = {one.id: one.state for one in index}
    return [
        f"{id}: it is {states[id]}" if id in states else f"{id}: there is no such letter"
        for id in sorted(selection.ids - {*chosen})
    ]


def _ask(question: str) -> None:
    """Asks where there is somebody to ask; ends the command at a no."""
    if sys.stdin.isatty() and not typer.confirm(question, err=True):
        raise typer.Exit(1)


def _finish(
    result: dict[str, Any], index: "Index", chosen: "list[LetterId]", as_json: bool
) -> None:
    """Prints what was done, or in a dry run what would be."""
    if result["dry_run"]:
        wanted = set(chosen)
        result["letters"] = [
            {"id": str(one.id), "failed_at": iso(one.failed_at_us), **one.group._asdict()}
            for one in index
            if one.id in wanted
        ]
    if as_json:
        print_json(result)
        return
    for failure in (*result["missing"], *result.get("first_failures", ())):
        typer.echo(f"not done: {failure}", err=True)
    if result["dry_run"]:
        columns = ("id", "failed_at", "lane", "stage", "reason")
        print_table(columns, [[one[name] for name in columns] for one in result["letters"]])
    shown = ("chosen", "replayed", "unmarked", "failed", "left_open", "marked")
    rows = [(name.replace("_", " "), result[name]) for name in shown if name in result]
    for name in ("would_delete", "deleted", "closed_kept"):
        if name in result:
            rows.append((f"records {name.replace('_', ' ')}", result[name]))
    print_table(("dry run, nothing changed" if result["dry_run"] else "", "count"), rows)


def _summary(index: "Index") -> list[dict[str, Any]]:
    states: tuple[State, ...] = ("open", "replayed", "purged", "unreadable")
    return [
        {**group._asdict(), **{state: counts[state] for state in states}}
        for group, counts in index.counts().items()
    ]
