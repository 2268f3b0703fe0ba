"""JSON lines: one market event a line, nested as in Python."""

from datetime import datetime
from typing import Any

import msgspec

from schemas.messages import Bar, Book, InvalidEvent, MarketEvent, Payload, Quote, Sample, Trade
from tapeline.sources.flat import epoch_us
from tapeline.sources.source import ReaderRequest, Rows, read_lines


class _JsonBook(msgspec.Struct, tag="book"):
    bids: list[tuple[float, float]]
    asks: list[tuple[float, float]]


class _JsonSample(msgspec.Struct, tag="sample"):
    values: list[float]


class _JsonEvent(msgspec.Struct):
    payload: Trade | Quote | Bar | _JsonBook | _JsonSample
    event_id: str | None = None
    symbol: str | None = None
    venue: str | None = None
    event_time_us: int | None = None
    event_time: datetime | None = None
    sequence: int | None = None


_decode = msgspec.json.Decoder(_JsonEvent).decode


def read_jsonl(request: ReaderRequest) -> Rows:
    """One JSON object a line. What a line says wins over what the user said of the file."""
    for row, line in read_lines(request):
        try:
            yield row, _event(_decode(line), row, request)
        except InvalidEvent as error:
            request.tally.reject(request.path, row, error.reason, str(error))
        except (msgspec.DecodeError, UnicodeDecodeError, OverflowError) as error:
            request.tally.reject(request.path, row, "malformed", str(error))


def _event(given: _JsonEvent, row: int, request: ReaderRequest) -> MarketEvent:
    symbol = given.symbol or request.symbol or ""
    venue = given.venue or request.venue or ""
    event_time_us = given.event_time_us
    if event_time_us is None:
        if given.event_time is None:
            raise InvalidEvent("missing_value", "neither event_time_us nor event_time is there")
        event_time_us = epoch_us(given.event_time)
    payload: Payload
    match given.payload:
        case _JsonBook(bids=bids, asks=asks):
            payload = Book.from_levels(bids, asks)
        case _JsonSample(values=values):
            payload = Sample.from_values(values)
        case other:
            payload = other
    return MarketEvent(
        event_id=given.event_id or f"{venue}:{symbol}:{_kind(payload)}:{event_time_us}:{row}",
        symbol=symbol,
        venue=venue,
        event_time_us=event_time_us,
        payload=payload,
        sequence=given.sequence,
    )


def _kind(payload: Payload) -> Any:
    return payload.__struct_config__.tag
