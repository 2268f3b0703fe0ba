"""The messages as Python sees them: what a user produces and subscribes to.

Immutable, typed, free of Kafka and Avro. ``schemas.codec`` turns them into bytes and back.
"""

import math
import operator
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_BOOK_LEVELS = 10
MAX_NAME_CHARS = 128  # of a symbol, a venue, an event id
MIN_PRICE, MAX_PRICE = 1e-12, 1e15  # any unit of any market; ratios stay finite in float32
MAX_SIZE = 1e18
MAX_LONG = 2**62  # half of Avro's long, so that differences fit too
_MAX_SAMPLE_VALUES = 4096
_LEVEL_BYTES = 16  # price and size, float64 each

Side = Literal["unknown", "buy", "sell"]
Headers = Sequence[tuple[str, bytes | None]]


class Trade(msgspec.Struct, frozen=True, tag="trade", gc=False):
    """One execution. ``side`` is the aggressor's."""

    price: float
    size: float
    side: Side = "unknown"


class Quote(msgspec.Struct, frozen=True, tag="quote", gc=False):
    """The best bid and ask. Sizes are 0 where the venue gives none."""

    bid_price: float
    bid_size: float
    ask_price: float
    ask_size: float


class Book(msgspec.Struct, frozen=True, tag="book", gc=False):
    """The visible order book after a change, best level first, at most 10 levels a side.

    Attributes:
        bids: little-endian float64 pairs (price, size), prices strictly falling.
        asks: the same, prices strictly rising.
    """

    bids: bytes
    asks: bytes

    @classmethod
    def from_levels(cls, bids: ArrayLike, asks: ArrayLike) -> "Book":
        """Takes two sequences of (price, size), best level first, each of shape (levels, 2)."""
        return cls(np.asarray(bids, "<f8").tobytes(), np.asarray(asks, "<f8").tobytes())

    @property
    def bid_levels(self) -> NDArray[np.float64]:
        """float64, shape (levels, 2): price, size; read-only, no copy."""
        return np.frombuffer(self.bids, "<f8").reshape(-1, 2)

    @property
    def ask_levels(self) -> NDArray[np.float64]:
        """float64, shape (levels, 2): price, size; read-only, no copy."""
        return np.frombuffer(self.asks, "<f8").reshape(-1, 2)


class Bar(msgspec.Struct, frozen=True, tag="bar", gc=False):
    """Open, high, low, close and volume of one interval; the event's time is its end."""

    open: float
    high: float
    low: float
    close: float
    volume: float
    interval_us: int


class Sample(msgspec.Struct, frozen=True, tag="sample", gc=False):
    """The producer's own channel values, taken as they are.

    Attributes:
        values: little-endian float32, one per channel of the lane's channel set.
    """

    values: bytes

    @classmethod
    def from_values(cls, values: ArrayLike) -> "Sample":
        """Takes shape (channels,)."""
        with np.errstate(over="ignore"):  # becomes inf, which check_event refuses
            return cls(np.asarray(values).astype("<f4").tobytes())


Payload = Trade | Quote | Book | Bar | Sample


class MarketEvent(msgspec.Struct, frozen=True, gc=False):
    """One event of a market tape.

    Attributes:
        event_id: unique among all lanes; the duplicate filter's key.
        event_time_us: when it happened at the venue; Unix epoch, microseconds, UTC.
        sequence: per (venue, symbol), each event one more than the last; None where unknown.
    """

    event_id: str
    symbol: str
    venue: str
    event_time_us: int
    payload: Payload
    sequence: int | None = None


class Flags(IntFlag):
    """What a subscriber should know about one feature vector."""

    GAP = 1  # events are missing before this one, by its sequence number
    OUT_OF_ORDER = 2  # older than its predecessor, by sequence or event time
    STALE = 4  # finished after its lane's deadline
    WARM_UP = 8  # reserved: windows that are not full emit nothing
    CACHED = 16  # the features came from the cache
    SKIPPED = 32  # events of this symbol just before were late, and their lane skips late ones


@dataclass(frozen=True, slots=True, eq=False)
class FeatureVector:
    """What the model made of one event's window.

    Attributes:
        event_time_us: of the event that completed the window.
        source_topic, source_partition, source_offset: that event's record.
        source_appended_us: when that was appended; Unix epoch, microseconds. 0: not known.
        features: float32, shape (F,).
        scores: named by the model artifact; may be empty.
    """

    event_id: str
    symbol: str
    venue: str
    event_time_us: int
    lane: str
    model_version: str
    channels_version: str
    source_topic: str
    source_partition: int
    source_offset: int
    features: NDArray[np.float32]
    scores: Mapping[str, float] = field(default_factory=dict)
    flags: Flags = Flags(0)  # noqa: RUF009 - immutable
    source_appended_us: int = 0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A record that no worker can process: the original, untouched, and why."""

    key: bytes | None
    value: bytes | None
    headers: Headers
    source_topic: str
    source_partition: int
    source_offset: int
    lane: str
    stage: str
    reason: str
    error_class: str
    message: str
    attempts: int
    failed_at_us: int
    model_version: str | None = None


class InvalidEvent(ValueError):
    """A market event breaks the contract; ``reason`` is a slug, the text says what and where."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_event(event: MarketEvent) -> None:
    """Raises InvalidEvent unless the event keeps the contract that channels and models rely on.

    Finite numbers, prices of MIN_PRICE to MAX_PRICE, sizes of 0 to MAX_SIZE, ordered books, short
    names.
    """
    for name in ("event_id", "symbol", "venue"):
        text = getattr(event, name)
        if not 0 < len(text) <= MAX_NAME_CHARS:
            raise InvalidEvent(
                "bad_name", f"{name} must have 1 to {MAX_NAME_CHARS} characters, not {len(text)}"
            )
        if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidEvent("bad_name", f"{name} holds half a surrogate pair: {text!a}")
    if not 0 < event.event_time_us <= MAX_LONG:
        raise InvalidEvent("bad_time", f"event_time_us must be positive, not {event.event_time_us}")
    if event.sequence is not None and not 0 <= event.sequence <= MAX_LONG:
        raise InvalidEvent("bad_sequence", f"sequence must not be negative, not {event.sequence}")
    match event.payload:
        case Trade(price, size):
            _check_price("price", price)
            _check_size("size", size)
        case Quote(bid_price, bid_size, ask_price, ask_size):
            _check_price("bid_price", bid_price)
            _check_price("ask_price", ask_price)
            _check_size("bid_size", bid_size)
            _check_size("ask_size", ask_size)
        case Book(bids, asks):
            _check_levels("bids", bids, rising=False)
            _check_levels("asks", asks, rising=True)
        case Bar(open_, high, low, close, volume, interval_us):
            for name, price in (("open", open_), ("high", high), ("low", low), ("close", close)):
                _check_price(name, price)
            _check_size("volume", volume)
            if not 0 < interval_us <= MAX_LONG:
                raise InvalidEvent("bad_time", f"interval_us must be positive, not {interval_us}")
        case Sample(values):
            _check_sample(values)


def _check_price(name: str, price: float) -> None:
    if not math.isfinite(price):
        raise InvalidEvent("not_finite", f"{name} must be a finite number, not {price}")
    if not MIN_PRICE <= price <= MAX_PRICE:
        raise InvalidEvent("bad_price", f"{name} must be {MIN_PRICE} to {MAX_PRICE}, not {price}")


def _check_size(name: str, size: float) -> None:
    if not math.isfinite(size):
        raise InvalidEvent("not_finite", f"{name} must be a finite number, not {size}")
    if size < 0:
        raise InvalidEvent("negative_size", f"{name} must not be negative, not {size}")
    if size > MAX_SIZE:
        raise InvalidEvent("bad_size", f"{name} must be at most {MAX_SIZE}, not {size}")


def _check_levels(name: str, side: bytes, *, rising: bool) -> None:
    num_levels, rest = divmod(len(side), _LEVEL_BYTES)
    if rest or num_levels > MAX_BOOK_LEVELS:
        raise InvalidEvent(
            "bad_book",
            f"{name} must hold at most {MAX_BOOK_LEVELS} levels of {_LEVEL_BYTES} bytes, "
            f"not {len(side)} bytes",
        )
    if not num_levels:
        return
    levels = struct.unpack(f"<{2 * num_levels}d", side)
    if not all(map(math.isfinite, levels)):
        raise InvalidEvent("not_finite", f"{name} must hold finite numbers")
    prices, sizes = levels[::2], levels[1::2]
    _check_price(f"{name}: price", min(prices))
    _check_price(f"{name}: price", max(prices))
    _check_size(f"{name}: size", min(sizes))
    _check_size(f"{name}: size", max(sizes))
    if not all(map(operator.lt if rising else operator.gt, prices, prices[1:])):
        order = "rise" if rising else "fall"
        raise InvalidEvent("bad_book", f"{name} must {order} strictly in price, best level first")


def _check_sample(values: bytes) -> None:
    if not values or len(values) % 4 or len(values) > 4 * _MAX_SAMPLE_VALUES:
        raise InvalidEvent(
            "bad_sample",
            f"values must be 1 to {_MAX_SAMPLE_VALUES} little-endian float32, "
            f"not {len(values)} bytes",
        )
    if not np.isfinite(np.frombuffer(values, "<f4")).all():
        raise InvalidEvent("not_finite", "values must hold finite numbers")
