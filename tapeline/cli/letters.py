"""Dead letters as the commands show them: a row of the list, one whole, its value as hex."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from tapeline.cli.terminal import print_json

if TYPE_CHECKING:
    from schemas.messages import Headers
    from schemas.settings import Settings
    from tapeline.dlq import Letter, Unreadable

_MAX_CHARS = 60  # of a message in the list
_HEX_BYTES = 16  # a line
_MAX_HEX_LINES = 64


def row_of(letter: "Letter | Unreadable", state: str) -> dict[str, Any]:
    """One line of the list."""
    from tapeline.dlq import Letter

    row = {"id": str(letter.id), "failed_at": iso(letter.failed_at_us), **letter.group._asdict()}
    if isinstance(letter, Letter):
        dead = letter.dead
        row |= {"attempts": dead.attempts, "source": letter.source, "message": dead.message}
    else:
        row |= {"attempts": None, "source": None, "message": letter.why}
    return row | {"state": state, "symbol": _text(letter.key)}


def cut_message(row: dict[str, Any]) -> str:
    """A row's message on one short line."""
    message = " ".join(row["message"].split())
    return message if len(message) <= _MAX_CHARS else f"{message[: _MAX_CHARS - 1]}…"


def whole(settings: "Settings", letter: "Letter | Unreadable") -> dict[str, Any]:
    """Everything about one letter; its value as an event, or as hex and why it is none."""
    from schemas.codec import Codec
    from schemas.errors import PoisonRecord
    from tapeline.dlq import Letter

    shown = row_of(letter, "")
    if isinstance(letter, Letter):
        value, headers = letter.dead.value, letter.dead.headers
        shown["error_class"] = letter.dead.error_class
        shown["model_version"] = letter.dead.model_version
    else:
        value, headers = letter.value, letter.headers
    del shown["symbol"]
    shown["key"] = _text(letter.key)
    shown["headers"] = [(name, _text(text)) for name, text in headers]
    shown["value_bytes"] = None if value is None else len(value)
    shown["event"] = shown["hex"] = None
    try:
        shown["event"] = _plain_event(Codec(settings.schema_registry), value, headers)
    except PoisonRecord as poison:
        shown["no_event"] = str(poison)
        shown["hex"] = None if value is None else value.hex()
    return shown


def _plain_event(codec: Any, value: bytes | None, headers: "Headers") -> dict[str, Any]:
    """An event as JSON has it; numbers in bytes as numbers. Raises PoisonRecord."""
    import msgspec
    import numpy as np

    from schemas.messages import Book, Sample

    event = codec.decode_event(value, headers)
    plain: dict[str, Any] = msgspec.to_builtins(event)
    if isinstance(event.payload, Book):
        plain["payload"]["bids"] = event.payload.bid_levels.tolist()
        plain["payload"]["asks"] = event.payload.ask_levels.tolist()
    elif isinstance(event.payload, Sample):
        plain["payload"]["values"] = np.frombuffer(event.payload.values, "<f4").tolist()
    return plain


def show_value(name: str, value: Any) -> None:
    """Prints an event as JSON, or hex as a dump."""
    if name == "event":
        typer.echo("event")
        print_json(value)
        return
    octets = bytes.fromhex(value)
    typer.echo("value")
    for line in hex_lines(octets[: _HEX_BYTES * _MAX_HEX_LINES]):
        typer.echo(f"  {line}")
    if (left := len(octets) - _HEX_BYTES * _MAX_HEX_LINES) > 0:
        typer.echo(f"  and {left:,} bytes more; `--raw FILE` writes them all")


def hex_lines(octets: bytes) -> Iterator[str]:
    """Offset, sixteen bytes as hex, and what of them is ASCII."""
    for start in range(0, len(octets), _HEX_BYTES):
        part = octets[start : start + _HEX_BYTES]
        text = "".join(chr(one) if 32 <= one < 127 else "." for one in part)
        yield f"{start:08x}  {part.hex(' '):<{3 * _HEX_BYTES}} {text}"


def write_raw(letter: "Letter | Unreadable", path: Path) -> None:
    """Writes the original's value, untouched. Raises ConfigError."""
    from schemas.errors import ConfigError
    from tapeline.dlq import Letter

    value = letter.dead.value if isinstance(letter, Letter) else letter.value
    if value is None:
        raise ConfigError(f"{letter.id} has no value to write; leave out --raw")
    try:
        path.write_bytes(value)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another file") from error


def _text(octets: bytes | None) -> str | None:
    """Bytes as a person reads them: UTF-8 if they are, else hex."""
    if octets is None:
        return None
    try:
        text = octets.decode()
    except UnicodeDecodeError:
        return f"0x{octets.hex()}"
    return text if text.isprintable() else f"0x{octets.hex()}"


def iso(time_us: int) -> str:
    """ISO, UTC, milliseconds; the number itself where no calendar has it."""
    try:
        time = datetime.fromtimestamp(time_us // 10**6, UTC)
    except (ValueError, OverflowError, OSError):
        return str(time_us)
    return f"{time:%Y-%m-%dT%H:%M:%S}.{time_us // 1000 % 1000:03}Z"
