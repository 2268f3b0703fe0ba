"""Tables with one event a row: CSV and Parquet, by the same column names."""

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from schemas.errors import ConfigError
from schemas.messages import (
    MAX_BOOK_LEVELS,
    Bar,
    Book,
    InvalidEvent,
    MarketEvent,
    Payload,
    Quote,
    Sample,
    Trade,
)
from tapeline.sources.source import ReaderRequest, Rows, read_lines

Cells = Mapping[str, Any]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_BAR_COLUMNS = ("open", "high", "low", "close", "volume", "interval_us")
_LEVEL_COLUMNS = {
    side: [(f"{side}_price_{level}", f"{side}_size_{level}") for level in range(1, 11)]
    for side in ("bid", "ask")
}
# What a row must have to be of a type; of several ways, one.
_REQUIRED: Mapping[str, Sequence[tuple[str, ...]]] = {
    "trade": [("price", "size")],
    "quote": [("bid_price", "ask_price")],
    "bar": [_BAR_COLUMNS],
    "book": [("bids", "asks"), ("bid_price_1", "bid_size_1", "ask_price_1", "ask_size_1")],
    "sample": [("values",), ("value_1",)],
}
_PARQUET_BATCH_ROWS = 4096


def read_csv(request: ReaderRequest) -> Rows:
    """CSV with a header row, one row a line, commas, UTF-8.

    Raises ConfigError at once if the columns cannot make an event.
    """
    lines = read_lines(request)
    header = next(lines, None)
    if header is None:
        raise ConfigError(f"{request.path} is empty; a CSV file starts with a row of column names")
    request.tally.rows -= 1  # the header is no row of the tape
    text = header[1].removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace")
    columns = [name.strip().lower() for name in next(csv.reader([text]))]
    parser = RowParser(columns, request)
    return _csv_rows(lines, columns, parser, request)


def _csv_rows(
    lines: Iterator[tuple[int, bytes]],
    columns: Sequence[str],
    parser: "RowParser",
    request: ReaderRequest,
) -> Rows:
    for row, line in lines:
        try:
            text = line.decode()
            # The csv module costs more than the rest of the row; most rows quote nothing.
            cells = next(csv.reader([text], strict=True)) if '"' in text else text.split(",")
            if len(cells) != len(columns):
                raise InvalidEvent(
                    "wrong_cell_count", f"{len(cells)} cells under {len(columns)} columns"
                )
            yield row, parser.event(dict(zip(columns, cells, strict=True)), row)
        except InvalidEvent as error:
            request.tally.reject(request.path, row, error.reason, str(error))
        except (UnicodeDecodeError, csv.Error) as error:
            request.tally.reject(request.path, row, "malformed", str(error))


def read_parquet(request: ReaderRequest) -> Rows:
    """Parquet, batch by batch; books and samples may be list columns.

    Raises ConfigError at once if it is no Parquet file or its columns cannot make an event.
    """
    import pyarrow as pa  # a third of a second that other formats do not need
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(request.file.raw)
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"{request.path} is no Parquet file ({error}); name its format with --format"
        ) from error
    columns = [name.strip().lower() for name in table.schema_arrow.names]
    return _parquet_rows(table, columns, RowParser(columns, request), request)


def _parquet_rows(
    table: Any, columns: Sequence[str], parser: "RowParser", request: ReaderRequest
) -> Rows:
    import pyarrow as pa

    tally, file = request.tally, request.file
    total_rows = max(1, table.metadata.num_rows)
    row = 0
    try:
        for batch in table.iter_batches(_PARQUET_BATCH_ROWS):
            for cells in zip(*(_cells(column) for column in batch.columns), strict=True):
                row += 1
                tally.rows += 1
                try:
                    yield row, parser.event(dict(zip(columns, cells, strict=True)), row)
                except InvalidEvent as error:
                    tally.reject(request.path, row, error.reason, str(error))
            # The footer is read first, so that the position in the file says nothing.
            file.bytes_read = file.total_bytes * row // total_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise ConfigError(
            f"{request.path} is damaged after {row} rows ({error}); fetch or write it again"
        ) from error


def _cells(column: Any) -> list[Any]:
    """A column as Python values; timestamps as whole microseconds, as their own clock has them."""
    import pyarrow as pa

    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz="UTC"), safe=False).cast(pa.int64())
    cells: list[Any] = column.to_pylist()
    return cells


class RowParser:
    """Turns named cells into an event. What a row says wins over what the user said of the file.

    Raises ConfigError when made, if the columns can make no event at all.
    """

    def __init__(self, columns: Sequence[str], request: ReaderRequest) -> None:
        path = request.path
        self._symbol, self._venue = request.symbol, request.venue
        self._ways = [
            (kind, way)
            for kind, ways in _REQUIRED.items()
            for way in ways
            if set(way) <= set(columns)
        ]
        twice = sorted({name for name in columns if columns.count(name) > 1})
        if twice:
            raise ConfigError(f"{path} names a column twice: {', '.join(twice)}; rename one")
        if not self._ways:
            needs = "; ".join(f"{kind}: {', '.join(ways[-1])}" for kind, ways in _REQUIRED.items())
            raise ConfigError(
                f"{path} has no columns that make an event (it has: {', '.join(columns)}); "
                f"give it a header row with the columns of one type ({needs})"
            )
        if not {"event_time_us", "event_time"} & set(columns):
            raise ConfigError(
                f"{path} has no event time; add a column event_time_us (microseconds since 1970, "
                "UTC) or event_time (ISO-8601)"
            )
        for name in ("symbol", "venue"):
            if name not in columns and not getattr(request, name):
                raise ConfigError(f"{path} has no column {name}; add one or give --{name}")

    def event(self, cells: Cells, row: int) -> MarketEvent:
        """Raises InvalidEvent. ``row`` tells events of one time apart if they have no ids."""
        symbol = _text(cells, "symbol") or self._symbol or ""
        venue = _text(cells, "venue") or self._venue or ""
        kind = self._kind(cells)
        event_time_us = _event_time_us(cells)
        sequence = cells.get("sequence")
        return MarketEvent(
            event_id=_text(cells, "event_id") or f"{venue}:{symbol}:{kind}:{event_time_us}:{row}",
            symbol=symbol,
            venue=venue,
            event_time_us=event_time_us,
            payload=_PAYLOADS[kind](cells),
            sequence=None if _is_empty(sequence) else _whole("sequence", sequence),
        )

    def _kind(self, cells: Cells) -> str:
        if kind := _text(cells, "type").lower():
            if kind not in _PAYLOADS:
                raise InvalidEvent("unknown_type", f"type {kind!r} is none of {[*_PAYLOADS]}")
            return kind
        kinds = {kind for kind, _ in self._ways}
        if len(kinds) > 1:
            kinds = {
                kind
                for kind, way in self._ways
                if not any(_is_empty(cells.get(name)) for name in way)
            }
        if len(kinds) != 1:
            raise InvalidEvent(
                "unknown_type", f"the cells fit {sorted(kinds) or 'no type'}; add a column type"
            )
        return kinds.pop()


def _trade(cells: Cells) -> Payload:
    side = _text(cells, "side").lower()
    match side:
        case "buy" | "sell":
            return Trade(_number(cells, "price"), _number(cells, "size"), side)
        case "" | "unknown":
            return Trade(_number(cells, "price"), _number(cells, "size"))
    raise InvalidEvent("bad_side", f"side must be buy, sell or unknown, not {side!r}")


def _quote(cells: Cells) -> Payload:
    return Quote(
        _number(cells, "bid_price"),
        _number(cells, "bid_size", default=0.0),
        _number(cells, "ask_price"),
        _number(cells, "ask_size", default=0.0),
    )


def _bar(cells: Cells) -> Payload:
    open_, high, low, close, volume = (_number(cells, name) for name in _BAR_COLUMNS[:5])
    interval_us = _whole("interval_us", cells.get("interval_us"))
    return Bar(open_, high, low, close, volume, interval_us)


def _book(cells: Cells) -> Payload:
    return Book.from_levels(_levels(cells, "bid"), _levels(cells, "ask"))


def _sample(cells: Cells) -> Payload:
    values = cells.get("values")
    if values is None:
        names = (f"value_{channel}" for channel in range(1, len(cells) + 1))
        values = [cells[name] for name in names if name in cells]
    if not isinstance(values, list):
        raise InvalidEvent("bad_sample", "values must be a list of numbers")
    return Sample.from_values([_as_float("values", value) for value in values])


_PAYLOADS: Mapping[str, Callable[[Cells], Payload]] = {
    "trade": _trade,
    "quote": _quote,
    "bar": _bar,
    "book": _book,
    "sample": _sample,
}


def _levels(cells: Cells, side: str) -> list[tuple[float, float]]:
    """From a list column of pairs or of {price, size}, else from numbered columns."""
    listed = cells.get(f"{side}s")
    if listed is not None:
        return _listed_levels(f"{side}s", listed)
    levels = []
    for price, size in _LEVEL_COLUMNS[side]:
        if _is_empty(cells.get(price)):
            break  # a thin book has fewer levels
        levels.append((_number(cells, price), _number(cells, size)))
    assert len(levels) <= MAX_BOOK_LEVELS
    return levels


def _listed_levels(name: str, listed: Iterable[Any]) -> list[tuple[float, float]]:
    levels = []
    for level in listed:
        pair = (level.get("price"), level.get("size")) if isinstance(level, dict) else level
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise InvalidEvent("bad_book", f"{name} must hold pairs of price and size")
        levels.append((_as_float(name, pair[0]), _as_float(name, pair[1])))
    return levels


def _is_empty(cell: Any) -> bool:
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _text(cells: Cells, name: str) -> str:
    cell = cells.get(name)
    return "" if cell is None else str(cell).strip()


def _number(cells: Cells, name: str, *, default: float | None = None) -> float:
    cell = cells.get(name)
    if _is_empty(cell):
        if default is None:
            raise InvalidEvent("missing_value", f"{name} is empty")
        return default
    return _as_float(name, cell)


def _as_float(name: str, cell: Any) -> float:
    try:
        return float(cell)
    except (TypeError, ValueError):
        raise InvalidEvent("not_a_number", f"{name} must be a number, not {cell!r}") from None


def _whole(name: str, cell: Any) -> int:
    if _is_empty(cell):
        raise InvalidEvent("missing_value", f"{name} is empty")
    if isinstance(cell, float) and not cell.is_integer():
        raise InvalidEvent("not_a_number", f"{name} must be a whole number, not {cell}")
    try:
        return int(cell)
    except (TypeError, ValueError, OverflowError):
        raise InvalidEvent("not_a_number", f"{name} must be a whole number, not {cell!r}") from None


def _event_time_us(cells: Cells) -> int:
    if not _is_empty(stamp := cells.get("event_time_us")):
        return _whole("event_time_us", stamp)
    stamp = cells.get("event_time")
    if _is_empty(stamp):
        raise InvalidEvent("missing_value", "event_time_us is empty")
    if isinstance(stamp, int):  # a Parquet timestamp
        return stamp
    try:
        return epoch_us(datetime.fromisoformat(str(stamp).strip()))
    except (ValueError, OverflowError):
        raise InvalidEvent(
            "bad_time", f"event_time must be ISO-8601 (2024-08-08T23:54:14.087Z), not {stamp!r}"
        ) from None


def epoch_us(stamp: datetime) -> int:
    """Microseconds since 1970; a stamp without an offset is UTC."""
    return ((stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND
