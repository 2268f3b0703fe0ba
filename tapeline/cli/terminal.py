"""What the commands share: settings, consoles, results as a table or as JSON."""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from schemas.settings import Settings

JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dataclasses.dataclass(frozen=True, slots=True)
class GlobalOptions:
    """What stands before the command's name."""

    config: Path | None = None


def settings_of(ctx: typer.Context) -> "Settings":
    """The user's settings, pointed at the local stack if one runs on other ports."""
    from tapeline.stack import with_stack_endpoints

    return with_stack_endpoints(given_settings(ctx))


def given_settings(ctx: typer.Context) -> "Settings":
    """The user's settings as they are given."""
    from schemas.settings import load_settings

    return load_settings(ctx.find_object(GlobalOptions).config)  # type: ignore[union-attr]


def out() -> "Console":
    """A console on stdout. Never narrower than a table needs when nobody looks."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True)


def err() -> "Console":
    """A console on stderr."""
    from rich.console import Console

    return Console(stderr=True, width=None if sys.stderr.isatty() else 160)


def print_json(result: Any) -> None:
    """One JSON document on stdout."""
    typer.echo(to_json(result))


def to_json(result: Any) -> str:
    """Dataclasses, mappings and lists of them as JSON text."""
    return json.dumps(result, default=_plain, indent=2)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> None:
    """A table on stdout; numbers to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = [list(row) for row in rows]
    table = Table(title=title or None, box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        numeric = bool(shown) and all(isinstance(row[index], int | float) for row in shown)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in shown:
        table.add_row(*(value if isinstance(value, Text) else Text(cell(value)) for value in row))
    out().print(table)


@contextmanager
def count_progress(
    what: str, console: "Console | None" = None
) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, told how much of how much is done; nothing where that is no terminal.

    Args:
        console: what is printed on it meanwhile stands above the bar.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = console or err()
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def cell(value: object, digits: int = 2) -> str:
    """A value as a table shows it; floats with so many digits behind the point."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.{digits}f}"
    return str(value)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
