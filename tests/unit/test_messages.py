"""``check_event``: every rule of the contract, at its edge and one step beyond."""

import math
from typing import Any

import numpy as np
import pytest

from schemas.messages import (
    MAX_BOOK_LEVELS,
    MAX_LONG,
    MAX_NAME_CHARS,
    MAX_PRICE,
    MAX_SIZE,
    MIN_PRICE,
    Bar,
    Book,
    InvalidEvent,
    MarketEvent,
    Payload,
    Quote,
    Sample,
    Trade,
    check_event,
)

BIDS = [(99.0, 2.0), (98.0, 1.0)]
ASKS = [(101.0, 3.0), (102.0, 1.0)]
BAR = (10.0, 12.0, 9.0, 11.0, 100.0)
TRADE = Trade(1.0, 1.0, "buy")


def event(payload: Payload = TRADE, **changes: Any) -> MarketEvent:
    fields: dict[str, Any] = {
        "event_id": "id",
        "symbol": "BTCUSDT",
        "venue": "binance-spot",
        "event_time_us": 1_700_000_000_000_000,
        "payload": payload,
    }
    return MarketEvent(**fields | changes)


@pytest.mark.parametrize(
    "good",
    [
        event(event_id="x" * MAX_NAME_CHARS, symbol="x", venue="x" * MAX_NAME_CHARS),
        event(symbol="ÄÖÜ-日本-🚀"),
        event(event_time_us=1),
        event(event_time_us=MAX_LONG),
        event(sequence=0),
        event(sequence=MAX_LONG),
        event(Trade(MIN_PRICE, 0.0)),
        event(Trade(MAX_PRICE, MAX_SIZE, "sell")),
        event(Quote(1.0, 0.0, 1.0, 0.0)),
        event(Quote(2.0, 1.0, 1.0, 1.0)),  # crossed: venues do that
        event(Book(b"", b"")),
        event(Book.from_levels(BIDS, ASKS)),
        event(Book.from_levels(BIDS, [])),
        event(Book.from_levels([], ASKS)),
        event(Book.from_levels([(MAX_PRICE, 0), (MIN_PRICE, MAX_SIZE)], [])),
        event(Book.from_levels([(20.0 - i, 1) for i in range(MAX_BOOK_LEVELS)], [])),
        event(Bar(*BAR, 1)),
        event(Bar(*BAR, MAX_LONG)),
        event(Sample.from_values([0.0])),
        event(Sample.from_values(np.full(4096, np.finfo(np.float32).max))),
    ],
)
def test_what_keeps_the_contract(good: MarketEvent) -> None:
    check_event(good)


@pytest.mark.parametrize("name", ["event_id", "symbol", "venue"])
@pytest.mark.parametrize("text", ["", "x" * (MAX_NAME_CHARS + 1), "\ud800", "BTC\udfffUSDT"])
def test_names(name: str, text: str) -> None:
    assert_refused(event(TRADE, **{name: text}), "bad_name", name)


@pytest.mark.parametrize("time_us", [0, -1, MAX_LONG + 1])
def test_times(time_us: int) -> None:
    assert_refused(event(event_time_us=time_us), "bad_time", "event_time_us")
    assert_refused(event(Bar(*BAR, time_us)), "bad_time", "interval_us")


@pytest.mark.parametrize("sequence", [-1, MAX_LONG + 1])
def test_sequences(sequence: int) -> None:
    assert_refused(event(sequence=sequence), "bad_sequence", "sequence")


BAD_PRICES = [
    (math.nan, "not_finite"),
    (math.inf, "not_finite"),
    (-math.inf, "not_finite"),
    (0.0, "bad_price"),
    (-1.0, "bad_price"),
    (MIN_PRICE / 2, "bad_price"),
    (MAX_PRICE * 2, "bad_price"),
]
BAD_SIZES = [
    (math.nan, "not_finite"),
    (math.inf, "not_finite"),
    (-math.inf, "not_finite"),
    (-1e-300, "negative_size"),
    (MAX_SIZE * 2, "bad_size"),
]


@pytest.mark.parametrize(("price", "reason"), BAD_PRICES)
def test_prices(price: float, reason: str) -> None:
    assert_refused(event(Trade(price, 1.0)), reason, "price")
    assert_refused(event(Quote(price, 1.0, 1.0, 1.0)), reason, "bid_price")
    assert_refused(event(Quote(1.0, 1.0, price, 1.0)), reason, "ask_price")
    assert_refused(event(Book.from_levels([(price, 1.0)], ASKS)), reason, "bids")
    assert_refused(event(Book.from_levels(BIDS, [(price, 1.0)])), reason, "asks")
    for index, name in enumerate(("open", "high", "low", "close")):
        values: list[Any] = [*BAR[:index], price, *BAR[index + 1 :], 1]
        assert_refused(event(Bar(*values)), reason, name)


@pytest.mark.parametrize(("size", "reason"), BAD_SIZES)
def test_sizes(size: float, reason: str) -> None:
    assert_refused(event(Trade(1.0, size)), reason, "size")
    assert_refused(event(Quote(1.0, size, 1.0, 1.0)), reason, "bid_size")
    assert_refused(event(Quote(1.0, 1.0, 1.0, size)), reason, "ask_size")
    assert_refused(event(Book.from_levels([*BIDS, (97.0, size)], ASKS)), reason, "bids")
    assert_refused(event(Book.from_levels(BIDS, [*ASKS, (103.0, size)])), reason, "asks")
    assert_refused(event(Bar(*BAR[:4], size, 1)), reason, "volume")


@pytest.mark.parametrize(("price", "reason"), BAD_PRICES)
def test_deep_levels_are_checked_like_the_best(price: float, reason: str) -> None:
    levels = [(20.0 - i, 1.0) for i in range(9)]
    assert_refused(event(Book.from_levels([*levels, (price, 1.0)], [])), reason, "bids")


@pytest.mark.parametrize(
    ("bids", "asks", "where"),
    [
        (BIDS[::-1], ASKS, "bids must fall strictly"),
        (BIDS, ASKS[::-1], "asks must rise strictly"),
        ([(99.0, 1.0), (99.0, 2.0)], ASKS, "bids must fall strictly"),
        (BIDS, [(101.0, 1.0), (101.0, 2.0)], "asks must rise strictly"),
        ([(30.0 - i, 1) for i in range(MAX_BOOK_LEVELS + 1)], [], "bids must hold at most 10"),
        ([], [(30.0 + i, 1) for i in range(MAX_BOOK_LEVELS + 1)], "asks must hold at most 10"),
    ],
)
def test_books_out_of_order_or_too_deep(bids: Any, asks: Any, where: str) -> None:
    assert_refused(event(Book.from_levels(bids, asks)), "bad_book", where)


@pytest.mark.parametrize("num_bytes", [1, 8, 15, 17])
def test_books_of_broken_levels(num_bytes: int) -> None:
    assert_refused(event(Book(b"\1" * num_bytes, b"")), "bad_book", "bids")
    assert_refused(event(Book(b"", b"\1" * num_bytes)), "bad_book", "asks")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (b"", "bad_sample"),
        (b"\0\0\0", "bad_sample"),
        (b"\0" * 5, "bad_sample"),
        (bytes(4 * 4097), "bad_sample"),
        (Sample.from_values([0.0, math.nan]).values, "not_finite"),
        (Sample.from_values([math.inf]).values, "not_finite"),
        (Sample.from_values([1e39]).values, "not_finite"),
    ],
)
def test_samples(values: bytes, reason: str) -> None:
    assert_refused(event(Sample(values)), reason, "values")


def test_levels_and_values_are_views_of_the_bytes() -> None:
    book = Book.from_levels(BIDS, ASKS)
    assert book.bid_levels.tolist() == [list(level) for level in BIDS]
    assert book.ask_levels.tolist() == [list(level) for level in ASKS]
    assert not book.bid_levels.flags.writeable
    assert Book.from_levels([], []) == Book(b"", b"")
    assert Sample.from_values([1, 2]).values == np.array([1, 2], "<f4").tobytes()


def assert_refused(bad: MarketEvent, reason: str, names: str) -> None:
    """Refused for this reason, by a text that names the field."""
    with pytest.raises(InvalidEvent) as refused:
        check_event(bad)
    assert refused.value.reason == reason
    assert names in str(refused.value)
