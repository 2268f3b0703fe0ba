"""Where market events come from: files in five formats, replayed at any speed.

>>> with open_source([Path("spot_btcusdt_20240808.gz")]) as source:
...     for event, due_s in pace(source, speed=10):
...         ...
...     print(source.statistics())
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from schemas.errors import ConfigError
from tapeline.sources import binance, lean
from tapeline.sources.flat import read_csv, read_parquet
from tapeline.sources.jsonl import read_jsonl
from tapeline.sources.pacing import pace, parse_speed
from tapeline.sources.source import (
    EventSource,
    Format,
    InputFile,
    ReaderRequest,
    Reject,
    SourceStatistics,
    Tally,
)

__all__ = [
    "FORMATS",
    "EventSource",
    "Reject",
    "SourceStatistics",
    "open_source",
    "pace",
    "parse_speed",
]

_FORMATS = [
    Format("jsonl", re.compile(r".*\.(jsonl|ndjson)(\.gz)?$"), read_jsonl),
    Format("csv", re.compile(r".*\.csv(\.gz)?$"), read_csv),
    Format("parquet", re.compile(r".*\.(parquet|pq)$"), read_parquet),
    Format("binance", binance.FILE_NAMES, binance.read_binance, numbers_events=True),
    Format("lean", lean.FILE_NAMES, lean.read_lean),
]
FORMATS: Mapping[str, Format] = {format_.name: format_ for format_ in _FORMATS}


def open_source(
    paths: Path | Sequence[Path],
    format: str | None = None,
    *,
    symbol: str | None = None,
    venue: str | None = None,
) -> EventSource:
    """Opens one file, or several that are merged by event time.

    Args:
        format: a key of ``FORMATS``; None: by each file's name.
        symbol, venue: for files whose rows do not say it; a row that does wins.

    Raises:
        ConfigError: a file that cannot be read, a format that is unknown or cannot be told from the
            name, columns that are missing.
    """
    several = [paths] if isinstance(paths, Path) else list(paths)
    if not several:
        raise ConfigError("there is no file to read; name at least one")
    tally = Tally()
    requests: list[tuple[ReaderRequest, Format]] = []
    try:
        for path in several:
            chosen = _format(path, format)
            requests.append((ReaderRequest(InputFile(path), tally, symbol, venue), chosen))
        return EventSource(requests, tally=tally)
    except BaseException:
        for request, _ in requests:
            request.file.close()
        raise


def _format(path: Path, name: str | None) -> Format:
    known = ", ".join(FORMATS)
    if name is not None:
        if name not in FORMATS:
            raise ConfigError(f"there is no format {name!r}; known are {known}")
        return FORMATS[name]
    for format_ in FORMATS.values():
        if format_.file_names.match(path.name.lower()):
            return format_
    raise ConfigError(
        f"the name {path.name} does not tell its format; give --format, one of {known}"
    )
