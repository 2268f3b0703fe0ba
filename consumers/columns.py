"""Market events as columns: what the worker does with hundreds of them, it does at once.

The Avro of the current schema is read here by compiled code, at a tenth of fastavro's cost. It
takes what is surely right and leaves the rest to ``schemas.codec``, which knows older schemas and
says what is wrong: the same events by either way (tests/property/test_columns.py).
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from consumers.compiled import compiled
from schemas.codec import Codec
from schemas.errors import PoisonRecord
from schemas.messages import (
    MAX_BOOK_LEVELS,
    MAX_LONG,
    MAX_NAME_CHARS,
    MAX_PRICE,
    MAX_SIZE,
    MIN_PRICE,
    Headers,
    MarketEvent,
)

TRADE, QUOTE, BOOK, BAR, SAMPLE = range(5)
"""The kinds of payloads, by their place in the schema's union."""
NO_SEQUENCE = -1
NUM_VALUES = 50

_REFUSED = 255
_LEVELS = MAX_BOOK_LEVELS
assert sys.byteorder == "little", "Avro's doubles are copied as they are"


@dataclass(frozen=True, slots=True, eq=False)
class EventColumns:
    """``n`` events that keep the contract of ``schemas.messages``, in their order.

    Attributes:
        ids: event ids.
        keys: symbols, UTF-8.
        symbols: symbol and venue as Avro has them, one behind the other: equal if both are.
        heads: Avro of id, symbol, venue and event time: a feature begins with the same bytes.
        times_us, sequences: int64, (n,); ``NO_SEQUENCE`` where there is none.
        kinds: uint8, (n,).
        values: float64, (n, 50): the payload's. Trade: price, size, sign. Quote: bid price, bid
            size, ask price, ask size. Book: ten bid prices, ten bid sizes, ten ask prices, ten ask
            sizes, 0 where there is no level. Bar: open, high, low, close, volume. Sample: its own.
    """

    ids: list[str]
    keys: list[bytes]
    symbols: list[bytes]
    heads: list[bytes]
    times_us: NDArray[np.int64]
    sequences: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.ids)

    def those(self, chosen: Sequence[bool]) -> "EventColumns":
        """The chosen ones, in their order."""
        if all(chosen):
            return self
        rows = np.fromiter(chosen, bool, len(self))
        return EventColumns(
            list(compress(self.ids, chosen)),
            list(compress(self.keys, chosen)),
            list(compress(self.symbols, chosen)),
            list(compress(self.heads, chosen)),
            self.times_us[rows],
            self.sequences[rows],
            self.kinds[rows],
            self.values[rows],
        )


def an_event() -> EventColumns:
    """One trade, to try code on."""
    one = np.ones(1, np.int64)
    values = np.ones((1, NUM_VALUES))
    return EventColumns(
        ["-"], [b"-"], [b"\x02-\x02-"], [b"-"], one, one, np.zeros(1, np.uint8), values
    )


def name_of(symbol: bytes) -> tuple[str, str]:
    """Venue and symbol of one of ``EventColumns.symbols``."""
    name, rest = _split(symbol)
    venue, _ = _split(rest)
    return venue.decode(), name.decode()


def _split(text: bytes) -> tuple[bytes, bytes]:
    """An Avro string, and what follows it; sizes need two bytes at most."""
    size, begin = text[0] >> 1, 1
    if text[0] & 0x80:
        size, begin = (text[0] & 0x7F | text[1] << 7) >> 1, 2
    return text[begin : begin + size], text[begin + size :]


class EventDecoder:
    """Turns records into columns. Compiles its code when it is made.

    Args:
        check: raises PoisonRecord for an event that the windows cannot take.
        max_bytes: a larger record is poison, and nobody looks into it.
    """

    def __init__(
        self, codec: Codec, check: Callable[[MarketEvent], None], max_bytes: int = 2**20
    ) -> None:
        self._max_bytes = max_bytes
        self._codec = codec
        self._check = check
        _scan_all([b""], b"\0", trusted=False)

    def decode(
        self, values: Sequence[bytes | None], headers: Sequence[Headers]
    ) -> tuple[EventColumns, dict[int, PoisonRecord]]:
        """The events of all records that are no poison, and the poison by its place.

        Raises TransientError while a Schema Registry does not answer.
        """
        most = self._max_bytes
        known = [value if value and len(value) <= most else b"" for value in values]
        prefix = self._codec.event_prefix
        scanned = _scan_all(known, prefix, trusted=False)
        poison: dict[int, PoisonRecord] = {}
        mended: list[int] = []
        for row in np.flatnonzero(scanned.kinds == _REFUSED).tolist():
            try:
                event = self._decode_one(values[row], headers[row])
            except PoisonRecord as error:
                poison[row] = error
            else:
                known[row] = self._codec.encode_event(event)
                mended.append(row)
        if mended:
            again = _scan_all([known[row] for row in mended], prefix, trusted=True)
            columns: Iterable[tuple[Any, Any]] = zip(scanned, again, strict=True)
            for column, fresh in columns:
                column[mended] = fresh
        events = _columns(known, scanned)
        if poison:
            events = events.those([row not in poison for row in range(len(known))])
        return events, poison

    def _decode_one(self, value: bytes | None, headers: Headers) -> MarketEvent:
        if value and len(value) > self._max_bytes:
            raise PoisonRecord(
                "decode",
                "too_large",
                f"{len(value)} bytes; worker.max_message_bytes is {self._max_bytes}",
            )
        event = self._codec.decode_event(value, headers)
        self._check(event)
        return event

    def columns_of(self, events: Sequence[MarketEvent]) -> EventColumns:
        """Events that are at hand. Raises InvalidEvent."""
        values = [self._codec.encode_event(event) for event in events]
        return _columns(values, _scan_all(values, self._codec.event_prefix, trusted=True))


class _Scanned(NamedTuple):
    """What a scan of ``n`` records found.

    Attributes:
        places: int64, (n, 7): where head, id, symbol and key begin, where key, symbol and head end.
        kinds: ``_REFUSED``: left to the codec, and the rest of its row says nothing.
    """

    places: NDArray[np.int64]
    times_us: NDArray[np.int64]
    sequences: NDArray[np.int64]
    kinds: NDArray[np.uint8]
    values: NDArray[np.float64]


def _columns(values: Sequence[bytes], scanned: _Scanned) -> EventColumns:
    """Cuts the names out of the records."""
    head, ids, symbols, keys, key_ends, symbol_ends, head_ends = scanned.places.T.tolist()
    return EventColumns(
        [value[a:b].decode() for value, a, b in zip(values, ids, symbols, strict=True)],
        [value[a:b] for value, a, b in zip(values, keys, key_ends, strict=True)],
        [value[a:b] for value, a, b in zip(values, symbols, symbol_ends, strict=True)],
        [value[a:b] for value, a, b in zip(values, head, head_ends, strict=True)],
        *scanned[1:],
    )


def _scan_all(records: Sequence[bytes], prefix: bytes, *, trusted: bool) -> _Scanned:
    """Reads records that begin with ``prefix``, in the current schema.

    Args:
        trusted: they are known to keep the contract.
    """
    num = len(records)
    scanned = _Scanned(
        np.zeros((num, 7), np.int64),
        np.zeros(num, np.int64),
        np.full(num, NO_SEQUENCE, np.int64),
        np.full(num, _REFUSED, np.uint8),
        np.zeros((num, NUM_VALUES), np.float64),
    )
    _scan(
        np.frombuffer(b"".join([*records, b"\0"]), np.uint8),
        np.cumsum(np.fromiter(map(len, records), np.int64, num)),
        np.frombuffer(prefix, np.uint8),
        trusted,
        *scanned,
        scanned.values.view(np.uint8),
    )
    return scanned


@compiled
def _long(record: NDArray[np.uint8], at: int, end: int) -> tuple[int, int]:
    """Avro's long at a place, and the next place; -1 for that if it is none, or not at its shortest
    (or one symbol would have several spellings).
    """
    bits = np.uint64(0)
    for num in range(10):
        if at + num >= end:
            return 0, -1
        byte = record[at + num]
        bits |= np.uint64(byte & 0x7F) << np.uint64(7 * num)
        if not byte & 0x80:
            if (num and not byte) or (num == 9 and byte > 1):
                return 0, -1
            value: Any = np.int64(bits >> np.uint64(1)) ^ -np.int64(bits & np.uint64(1))
            return value, at + num + 1
    return 0, -1


@compiled
def _name(record: NDArray[np.uint8], at: int, end: int, trusted: bool) -> tuple[int, int]:
    """Where a name begins and ends; -1 for that if it is none, or is not surely one."""
    size, begin = _long(record, at, end)
    if begin < 0 or size < 1 or begin + size > end or (not trusted and size > MAX_NAME_CHARS):
        return 0, -1
    if not trusted:
        for place in range(begin, begin + size):
            if record[place] & 0x80:
                return 0, -1
    return begin, begin + size


@compiled
def _doubles(record: NDArray[np.uint8], at: int, end: int, num: int, out: NDArray[np.uint8]) -> int:
    """Copies so many doubles; the next place, or -1."""
    size = 8 * num
    if at < 0 or at + size > end:
        return -1
    for byte in range(size):
        out[byte] = record[at + byte]
    return at + size


@compiled
def _is_price(price: float) -> bool:
    return MIN_PRICE <= price <= MAX_PRICE


@compiled
def _is_size(size: float) -> bool:
    return 0 <= size <= MAX_SIZE


@compiled
def _side(
    record: NDArray[np.uint8],
    at: int,
    end: int,
    rising: bool,
    levels: NDArray[np.float64],
    level_bytes: NDArray[np.uint8],
    prices: NDArray[np.float64],
    sizes: NDArray[np.float64],
) -> int:
    """One side of a book; the next place, or -1."""
    size, at = _long(record, at, end)
    num = size // 16
    if at < 0 or size % 16 or num < 0 or num > _LEVELS:
        return -1
    at = _doubles(record, at, end, 2 * num, level_bytes)
    if at < 0:
        return -1
    for level in range(num):
        prices[level], sizes[level] = levels[2 * level], levels[2 * level + 1]
        if not (_is_price(prices[level]) and _is_size(sizes[level])):
            return -1
        if level:
            step = prices[level] - prices[level - 1]
            if not (step > 0 if rising else step < 0):
                return -1
    return at


@compiled
def _payload(
    record: NDArray[np.uint8],
    at: int,
    end: int,
    kind: int,
    values: NDArray[np.float64],
    value_bytes: NDArray[np.uint8],
    scratch: NDArray[np.float64],
    scratch_bytes: NDArray[np.uint8],
) -> int:
    """Reads a payload into ``values``, float64, (50,); the next place, or -1."""
    if kind == TRADE:
        at = _doubles(record, at, end, 2, value_bytes)
        if at < 0 or not (_is_price(values[0]) and _is_size(values[1])):
            return -1
        side, at = _long(record, at, end)
        if side == 1:
            values[2] = 1.0
        elif side == 2:
            values[2] = -1.0
        elif side != 0:
            return -1
    elif kind == QUOTE:
        at = _doubles(record, at, end, 4, value_bytes)
        if at < 0 or not (_is_price(values[0]) and _is_price(values[2])):
            return -1
        if not (_is_size(values[1]) and _is_size(values[3])):
            return -1
    elif kind == BOOK:
        for side in range(2):
            base = 2 * _LEVELS * side
            at = _side(
                record,
                at,
                end,
                side == 1,
                scratch,
                scratch_bytes,
                values[base : base + _LEVELS],
                values[base + _LEVELS : base + 2 * _LEVELS],
            )
            if at < 0:
                return -1
    elif kind == BAR:
        at = _doubles(record, at, end, 5, value_bytes)
        if at < 0 or not _is_size(values[4]):
            return -1
        for price in range(4):
            if not _is_price(values[price]):
                return -1
        interval_us, at = _long(record, at, end)
        if interval_us <= 0 or interval_us > MAX_LONG:
            return -1
    elif kind == SAMPLE:
        size, at = _long(record, at, end)
        if at < 0 or size != 4 * NUM_VALUES or at + size > end:
            return -1
        singles = scratch_bytes[:size].view(np.float32)
        for byte in range(size):
            scratch_bytes[byte] = record[at + byte]
        for place in range(NUM_VALUES):
            if not np.isfinite(singles[place]):
                return -1
            values[place] = singles[place]
        at += size
    else:
        return -1
    return at


@compiled
def _scan(
    records: NDArray[np.uint8],
    ends: NDArray[np.int64],
    prefix: NDArray[np.uint8],
    trusted: bool,
    places: NDArray[np.int64],
    times_us: NDArray[np.int64],
    sequences: NDArray[np.int64],
    kinds: NDArray[np.uint8],
    values: NDArray[np.float64],
    value_bytes: NDArray[np.uint8],
) -> None:
    """Reads records that lie one behind the other, and leaves alone what is not surely right."""
    scratch = np.empty(NUM_VALUES)
    scratch_bytes = scratch.view(np.uint8)
    end = 0
    for row in range(len(ends)):
        begin, end = end, ends[row]
        at = begin + len(prefix)
        if at > end:
            continue
        is_tagged = True
        for place in range(len(prefix)):
            is_tagged &= records[begin + place] == prefix[place]
        if not is_tagged:
            continue
        head = at
        id_begin, at = _name(records, at, end, trusted)
        if at < 0:
            continue
        symbol = at
        key_begin, key_end = _name(records, symbol, end, trusted)
        if key_end < 0:
            continue
        _, symbol_end = _name(records, key_end, end, trusted)
        if symbol_end < 0:
            continue
        time_us, head_end = _long(records, symbol_end, end)
        if head_end < 0 or time_us <= 0 or time_us > MAX_LONG:
            continue
        is_numbered, at = _long(records, head_end, end)
        if at < 0 or is_numbered < 0 or is_numbered > 1:
            continue
        sequence = NO_SEQUENCE
        if is_numbered:
            sequence, at = _long(records, at, end)
            if at < 0 or sequence < 0 or sequence > MAX_LONG:
                continue
        kind, at = _long(records, at, end)
        if at < 0:
            continue
        at = _payload(records, at, end, kind, values[row], value_bytes[row], scratch, scratch_bytes)
        if at != end:
            values[row] = 0
            continue
        kinds[row] = kind
        times_us[row] = time_us
        sequences[row] = sequence
        found = places[row]
        found[0], found[1], found[2], found[3] = head, id_begin, symbol, key_begin
        found[4], found[5], found[6] = key_end, symbol_end, head_end
        for place in range(7):
            found[place] -= begin
