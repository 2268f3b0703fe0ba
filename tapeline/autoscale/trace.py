"""Decisions, recorded as JSON lines: what ``explain`` shows and ``replay`` plays."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from schemas.settings import Settings
from tapeline.autoscale.rules import Decision, LaneLoad

TRACE_FILE = "autoscale.jsonl"
_MAX_BYTES = 64 << 20  # then it begins anew beside its predecessor
_TAIL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Entry:
    """One decision for one deployment, or why there was none.

    Attributes:
        at_s: Unix time.
        role: ``workers`` or ``replicas``.
        running: that work now.
        decision: None: held.
        held: why everything stays as it is.
    """

    at_s: float
    role: str
    running: int
    lanes: tuple[LaneLoad, ...]
    decision: Decision | None
    held: str | None = None


def trace_path(settings: Settings) -> Path:
    """Where decisions are recorded."""
    return settings.autoscale.trace or settings.state_dir / TRACE_FILE


def record(path: Path, entry: Entry) -> None:
    """Appends a line; a file that has grown large is put aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > _MAX_BYTES:
        path.rename(path.with_suffix(".1.jsonl"))
    with path.open("a") as file:
        file.write(json.dumps(asdict(entry)) + "\n")


def read(path: Path) -> Iterator[Entry]:
    """The entries of a file. Raises ConfigError: it cannot be read, or a line is none."""
    try:
        with path.open() as file:
            for number, line in enumerate(file, 1):
                yield _entry(path, number, line)
    except OSError as error:
        raise _unreadable(path, error) from error


def last(path: Path) -> dict[str, Entry]:
    """The last entry of each role, looked for at the end of the file. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            begin = max(0, path.stat().st_size - _TAIL_BYTES)
            file.seek(begin)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError as error:
        raise _unreadable(path, error) from error
    if begin:
        lines = lines[1:]  # cut off in front
    entries = [_entry(path, number, line) for number, line in enumerate(lines, 1)]
    return {entry.role: entry for entry in entries}


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot read the trace {path}: {error.strerror}; `tapeline run` writes one while "
        "autoscale.enabled is true"
    )


def _entry(path: Path, number: int, line: str) -> Entry:
    try:
        fields: dict[str, Any] = json.loads(line)
        lanes = tuple(LaneLoad(**lane) for lane in fields.pop("lanes"))
        decision = fields.pop("decision")
        return Entry(lanes=lanes, decision=Decision(**decision) if decision else None, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: line {number} is no decision: {error}") from error
