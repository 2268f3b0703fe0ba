"""``tapeline audit``."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from tapeline.cli.terminal import JsonOption, err, print_json, print_table, settings_of

if TYPE_CHECKING:
    from tapeline.audit import AuditReport
    from tapeline.ledger import Kind

_COLUMNS = {
    "lane": "lane",
    "records": "records",
    "owed": "owed",
    "features": "features",
    "repeats": "repeats",
    "warm_up": "warm-up",
    "thinned": "thinned",
    "skipped": "skipped",
    "duplicates": "duplicates",
    "dead_letters": "dead letters",
    "optional": "optional",
    "pending": "pending",
    "unprovable": "unprovable",
}
_SHOWN_KINDS: dict["Kind", str] = {"lost": "lost", "twice": "twice", "order": "disordered"}
_MAX_SHOWN_IDS = 5


class Promise(StrEnum):
    """What delivery promises."""

    at_least_once = "at_least_once"
    exactly_once = "exactly_once"


def audit(
    ctx: typer.Context,
    lane: Annotated[
        list[str] | None, typer.Option(help="Only this lane; may be given again.")
    ] = None,
    settled: Annotated[
        bool,
        typer.Option(
            "--settled",
            help="All is worked off: every record must have its end, not only those "
            "below the committed offset.",
        ),
    ] = False,
    delivery: Annotated[
        Promise | None, typer.Option(help="Hold them to this; else worker.delivery.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Prove that nothing was lost, doubled, disordered or made up.

    Reads what went into each lane and what came out, features and dead letters, works out what was
    owed, and prints the first violation. Exit 1 if there is one.
    """
    from tapeline.audit import audit as prove

    settings = settings_of(ctx)
    with _progress() as show:
        report = prove(
            settings,
            lane or None,
            settled=settled,
            delivery=delivery.value if delivery else None,
            progress=show,
        )
    if json:
        print_json(_as_json(report))
    else:
        _show(report)
    if not report.is_clean:
        raise typer.Exit(1)


def _show(report: "AuditReport") -> None:
    kinds = [one for one in report.lanes[0].violations if one not in _SHOWN_KINDS]
    other = [kind for kind in kinds if any(lane.violations[kind] for lane in report.lanes)]
    rows = [
        (
            *(getattr(lane, name) for name in _COLUMNS),
            *(lane.violations[kind] for kind in (*_SHOWN_KINDS, *other)),
        )
        for lane in report.lanes
    ]
    verdict = "clean" if report.is_clean else "NOT CLEAN"
    until = "all records" if report.settled else "records below the committed offset"
    print_table(
        (*_COLUMNS.values(), *_SHOWN_KINDS.values(), *other),
        rows,
        title=f"{verdict}: {report.delivery}, {until}; {report.num_read:,} read in "
        f"{report.seconds:,.1f} s",
    )
    if report.duplicates:
        shown = ", ".join(report.duplicates[:_MAX_SHOWN_IDS])
        more = ", …" if len(report.duplicates) > _MAX_SHOWN_IDS else ""
        typer.echo(f"{len(report.duplicates):,} events published more than once: {shown}{more}")
    if report.first_violation:
        typer.echo(report.first_violation.sentence)


def _as_json(report: "AuditReport") -> dict[str, object]:
    return {
        "clean": report.is_clean,
        "delivery": report.delivery,
        "settled": report.settled,
        "lanes": report.lanes,
        "violations": [
            {name: getattr(one, name) for name in ("kind", "lane", "venue", "symbol", "event_id")}
            | {"source": str(one.source), "at_us": one.at_us, "sentence": one.sentence}
            for one in report.violations
        ],
        "duplicates": report.duplicates,
        "records_read": report.num_read,
        "seconds": round(report.seconds, 3),
    }


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar by offsets with the rate; nothing where stderr is no terminal."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    console = err()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, text="")
        start_s = time.monotonic()

        def show(passed: int, total: int) -> None:
            rate = passed / max(time.monotonic() - start_s, 1e-3)
            text = f"{passed:,} of {total:,} records, {rate:,.0f}/s"
            progress.update(task, completed=passed, total=total, text=text)

        yield show
