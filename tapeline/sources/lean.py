"""LEAN's zipped tapes: crypto minute and second bars and quotes, crypto and forex quote ticks.

A zip ``<yyyymmdd>_trade.zip`` or ``_quote.zip`` holds one headless CSV whose name tells date,
symbol and resolution (``20180404_btcusd_minute_trade.csv``). Times are milliseconds since midnight,
UTC.
"""

import io
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Final, cast

from schemas.errors import ConfigError
from schemas.messages import Bar, InvalidEvent, MarketEvent, Payload, Quote
from tapeline.sources.flat import epoch_us
from tapeline.sources.source import ReaderRequest, Rows, read_lines

FILE_NAMES: Final = re.compile(r"\d{8}_(trade|quote)\.zip$")
_MEMBER: Final = re.compile(r"(\d{8})_(\w+)_(minute|second|tick)_(trade|quote)\.csv$")
_INTERVAL_US: Final = {"minute": 60_000_000, "second": 1_000_000, "tick": 0}
_MARKETS: Final = ("coinbase", "binance", "bitfinex", "bybit", "gdax", "kraken", "fxcm", "oanda")
_NUM_CELLS: Final = {
    ("bar", "trade"): (6,),
    ("bar", "quote"): (11,),
    ("tick", "quote"): (3, 5),  # forex gives no sizes
}


@dataclass(frozen=True, slots=True)
class _Tape:
    """One CSV in a zip: what its name says of every row."""

    symbol: str
    venue: str
    kind: str  # trade or quote
    midnight_us: int
    interval_us: int  # 0: ticks
    num_cells: tuple[int, ...]


def read_lean(request: ReaderRequest) -> Rows:
    """The rows of one zip. A bar, and a quote that closes one, has the time of the interval's end.

    Raises ConfigError at once for anything but a LEAN zip of the kinds above.
    """
    try:
        archive = zipfile.ZipFile(request.file.raw)
        [name] = archive.namelist()
        stream = io.BufferedReader(cast("io.RawIOBase", archive.open(name)))
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(
            f"{request.path} is no LEAN tape ({error}); a zip with one CSV is expected"
        ) from error
    tape = _tape(request, name)
    return _rows(request, cast("BinaryIO", stream), tape)


def _rows(request: ReaderRequest, stream: BinaryIO, tape: _Tape) -> Rows:
    for row, line in read_lines(request, stream):
        try:
            yield row, _event(line.decode().split(","), tape, row)
        except InvalidEvent as error:
            request.tally.reject(request.path, row, error.reason, str(error))
        except ValueError as error:
            request.tally.reject(request.path, row, "malformed", str(error))


def _event(cells: Sequence[str], tape: _Tape, row: int) -> MarketEvent:
    if len(cells) not in tape.num_cells:
        raise InvalidEvent("wrong_cell_count", f"{len(cells)} cells instead of {tape.num_cells[0]}")
    if "" in cells:
        # LEAN writes a quote bar without one side when nobody quoted it.
        raise InvalidEvent("missing_value", f"cell {cells.index('') + 1} is empty")
    numbers = [float(cell) for cell in cells]
    event_time_us = tape.midnight_us + round(numbers[0] * 1000) + tape.interval_us
    payload: Payload
    if tape.kind == "trade":
        open_, high, low, close, volume = numbers[1:]
        payload = Bar(open_, high, low, close, volume, tape.interval_us)
    elif tape.interval_us:
        payload = Quote(numbers[4], numbers[5], numbers[9], numbers[10])
    elif len(numbers) == 3:
        payload = Quote(numbers[1], 0.0, numbers[2], 0.0)
    else:
        payload = Quote(*numbers[1:])
    return MarketEvent(
        event_id=f"{tape.venue}:{tape.symbol}:{tape.kind}:{event_time_us}:{row}",
        symbol=tape.symbol,
        venue=tape.venue,
        event_time_us=event_time_us,
        payload=payload,
    )


def _tape(request: ReaderRequest, member: str) -> _Tape:
    path = request.path
    named = _MEMBER.match(Path(member).name)
    if named is None:
        raise ConfigError(
            f"{path} holds {member}, which is no <yyyymmdd>_<symbol>_<resolution>_<type>.csv; "
            "LEAN's minute, second and tick tapes of crypto and forex are read"
        )
    date, symbol, resolution, kind = named.groups()
    num_cells = _NUM_CELLS.get(("tick" if resolution == "tick" else "bar", kind))
    if num_cells is None or "equity" in path.resolve().parts:
        raise ConfigError(
            f"{path}: LEAN's {resolution} {kind} tapes of this kind are not read; give minute or "
            "second tapes, or quote ticks, of crypto or forex"
        )
    venue = request.venue or _market(path)
    if not venue:
        raise ConfigError(f"{path}: no folder names LEAN's market; give it with --venue")
    try:
        midnight = datetime.strptime(date, "%Y%m%d").replace(tzinfo=UTC)
    except ValueError as error:
        raise ConfigError(f"{path} holds {member}, whose date does not exist") from error
    return _Tape(
        symbol=(request.symbol or symbol).upper(),
        venue=venue,
        kind=kind,
        midnight_us=epoch_us(midnight),
        interval_us=_INTERVAL_US[resolution],
        num_cells=num_cells,
    )


def _market(path: Path) -> str:
    """LEAN's own layout is <security>/<market>/<resolution>/<symbol>/<date>_<type>.zip."""
    folders = path.resolve().parent.parts[::-1]
    if len(folders) > 2 and folders[1] in _INTERVAL_US:
        return folders[2]
    words = [word for folder in folders[:4] for word in folder.lower().split("_")]
    return next((market for market in _MARKETS if market in words), "")
