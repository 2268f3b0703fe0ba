"""``market50-v1`` by hand: every channel's formula on numbers that a reader can check.

Prices are in basis points from the mid, sizes as ln(1 + size); see docs/DESIGN.md, 3.3.
"""

from collections.abc import Sequence
from math import log, log1p

import numpy as np
import pytest
from columns import columns_of
from numpy.typing import NDArray

from consumers.channels import CHANNEL_SETS, NEVER, Market50, channel_set
from schemas.errors import ConfigError, PoisonRecord
from schemas.messages import Bar, Book, MarketEvent, Payload, Quote, Sample, Trade

BID_PRICES, BID_SIZES = slice(0, 10), slice(10, 20)
ASK_PRICES, ASK_SIZES = slice(20, 30), slice(30, 40)
MID_RETURN, SPREAD, MICRO_PRICE = 40, 41, 42
IMBALANCES = slice(43, 46)  # of 1, 5 and 10 levels
TRADE_SIZE, TRADE_RETURN, ELAPSED, TRADE_RATE = 46, 47, 48, 49

START_US = 1_700_000_000_000_000
SECOND_US = 1_000_000

# Mid 100: a basis point is 0.01.
BOOK = Book.from_levels([(99.99, 3.0), (99.98, 1.0)], [(100.01, 1.0), (100.03, 4.0)])


def rows_of(
    payloads: Sequence[Payload], times_us: Sequence[int] | None = None
) -> NDArray[np.float32]:
    """The rows of one symbol that was never seen before, an event a second."""
    return _run(payloads, times_us)[0]


def floors_of(payloads: Sequence[Payload]) -> list[int]:
    """The lowest offset that each row leans on; offsets are 0, 1, 2, ..."""
    return [int(floor) for floor in _run(payloads, None)[1]]


def _run(
    payloads: Sequence[Payload], times_us: Sequence[int] | None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    channels = Market50()
    num_events = len(payloads)
    if times_us is None:
        times_us = [START_US + SECOND_US * step for step in range(num_events)]
    events = [
        MarketEvent(f"id-{index}", "S", "V", time_us, payload)
        for index, (payload, time_us) in enumerate(zip(payloads, times_us, strict=True))
    ]
    rows, floors = channels.rows(
        columns_of(events),
        np.arange(num_events),
        np.zeros(num_events, np.int64),
        np.arange(num_events) == 0,
        np.zeros(1, channels.state),
    )
    assert rows.dtype == np.float32
    assert rows.shape == (num_events, channels.num_channels)
    return rows, floors


def test_book_levels_are_offsets_from_the_mid_and_log_sizes() -> None:
    (row,) = rows_of([BOOK])
    np.testing.assert_allclose(row[BID_PRICES], [-1, -2, *[0] * 8], rtol=1e-5)
    np.testing.assert_allclose(row[ASK_PRICES], [1, 3, *[0] * 8], rtol=1e-5)
    np.testing.assert_allclose(row[BID_SIZES], [log1p(3), log1p(1), *[0] * 8], rtol=1e-6)
    np.testing.assert_allclose(row[ASK_SIZES], [log1p(1), log1p(4), *[0] * 8], rtol=1e-6)


def test_all_ten_levels_have_their_place() -> None:
    bids = [(100 - 0.01 * (i + 1), 2.0**i - 1) for i in range(10)]
    asks = [(100 + 0.02 * (i + 1) - 0.01, 3.0**i - 1) for i in range(10)]
    (row,) = rows_of([Book.from_levels(bids, asks)])
    levels = np.arange(10)
    np.testing.assert_allclose(row[BID_PRICES], -(levels + 1.0), rtol=1e-4)
    np.testing.assert_allclose(row[ASK_PRICES], 2.0 * levels + 1, rtol=1e-4)
    np.testing.assert_allclose(row[BID_SIZES], levels * log(2), rtol=1e-6)
    np.testing.assert_allclose(row[ASK_SIZES], levels * log(3), rtol=1e-6)


def test_spread_micro_price_and_imbalances() -> None:
    (row,) = rows_of([BOOK])
    assert row[SPREAD] == pytest.approx(2, rel=1e-5)
    # (100.01 * 3 + 99.99 * 1) / 4 = 100.005: half a basis point above the mid
    assert row[MICRO_PRICE] == pytest.approx(0.5, rel=1e-5)
    best, five, ten = row[IMBALANCES]
    assert best == pytest.approx((3 - 1) / (3 + 1))
    assert five == ten == pytest.approx((4 - 5) / (4 + 5))


def test_imbalance_of_five_and_of_ten_levels_differ_in_depth() -> None:
    bids = [(100.0 - i, 1.0 + i) for i in range(10)]  # 1, 2, 3, ..., 10
    asks = [(101.0 + i, 2.0) for i in range(10)]
    (row,) = rows_of([Book.from_levels(bids, asks)])
    expected = [(1 - 2) / 3, (15 - 10) / 25, (55 - 20) / 75]
    np.testing.assert_allclose(row[IMBALANCES], expected, rtol=1e-6)


def test_mid_return_is_the_log_of_the_mid_over_the_one_before() -> None:
    rows = rows_of([Quote(99.0, 1, 101.0, 1), Quote(100.0, 1, 102.0, 1), Quote(100.0, 5, 102.0, 1)])
    expected = [0, log(101 / 100) * 1e4, 0]
    np.testing.assert_allclose(rows[:, MID_RETURN], expected, rtol=1e-6)


def test_trade_gives_signed_log_size_and_return() -> None:
    rows = rows_of(
        [Trade(100.0, 3.0, "buy"), Trade(101.0, 1.0, "sell"), BOOK, Trade(99.0, 8.0, "unknown")]
    )
    sizes = [log1p(3), -log1p(1), -log1p(1), 0]
    np.testing.assert_allclose(rows[:, TRADE_SIZE], sizes, rtol=1e-6)
    up, down = log(101 / 100) * 1e4, log(99 / 101) * 1e4
    np.testing.assert_allclose(rows[:, TRADE_RETURN], [0, up, up, down], rtol=1e-6)


@pytest.mark.parametrize(("close", "sign"), [(11.0, 1), (9.0, -1), (10.0, 0)])
def test_bar_counts_as_a_trade_at_its_close(close: float, sign: int) -> None:
    rows = rows_of([Trade(8.0, 1.0, "buy"), Bar(10.0, 12.0, 7.0, close, 5.0, SECOND_US)])
    assert rows[1, TRADE_SIZE] == pytest.approx(sign * log1p(5))
    assert rows[1, TRADE_RETURN] == pytest.approx(log(close / 8) * 1e4)
    assert rows[1, MID_RETURN] == pytest.approx(log(close / 8) * 1e4), "it is the mid, too"
    assert rows[1, TRADE_RATE] == pytest.approx(log1p(2 / 1))


def test_elapsed_time_is_the_log_of_microseconds() -> None:
    times_us = [START_US, START_US + 250, START_US + 250, START_US + 100, START_US + 100_100]
    rows = rows_of([BOOK] * 5, times_us)
    expected = [0, log1p(250), 0, 0, log1p(100_000)]  # going back in time counts as none
    np.testing.assert_allclose(rows[:, ELAPSED], expected, rtol=1e-6)


def test_trade_rate_is_trades_per_second_of_the_last_twenty_events() -> None:
    trade, quote = Trade(1.0, 1.0, "buy"), Quote(1.0, 1, 2.0, 1)
    rows = rows_of([trade, quote, trade, *[quote] * 18, trade])
    rate = rows[:, TRADE_RATE]
    assert rate[0] == pytest.approx(log1p(1 / 0.001)), "of one event: a millisecond at least"
    assert rate[1] == pytest.approx(log1p(1 / 1))
    assert rate[2] == pytest.approx(log1p(2 / 2))
    assert rate[19] == pytest.approx(log1p(2 / 19))
    assert rate[20] == pytest.approx(log1p(1 / 19)), "the first trade is the 21st event back"
    assert rate[21] == pytest.approx(log1p(2 / 19))


def test_quote_replaces_the_best_level_until_the_next_book() -> None:
    rows = rows_of([BOOK, Quote(99.0, 7.0, 101.0, 9.0), BOOK])
    np.testing.assert_allclose(rows[1, [0, 20]], [-100, 100], rtol=1e-6)
    np.testing.assert_allclose(rows[1, [10, 30]], [log1p(7), log1p(9)], rtol=1e-6)
    np.testing.assert_allclose(rows[1, [1, 21]], [-2, 3], rtol=1e-5, err_msg="the book's second")
    assert rows[1, SPREAD] == pytest.approx(200)
    assert rows[1, IMBALANCES][1] == pytest.approx((7 + 1 - 9 - 4) / 21)
    np.testing.assert_array_equal(rows[2, :40], rows[0, :40])


def test_quote_without_any_book_has_one_level() -> None:
    (row,) = rows_of([Quote(99.0, 1.0, 101.0, 0.0)])
    np.testing.assert_allclose(row[BID_PRICES], [-100, *[0] * 9], rtol=1e-6)
    np.testing.assert_allclose(row[ASK_PRICES], [100, *[0] * 9], rtol=1e-6)
    np.testing.assert_array_equal(row[IMBALANCES], [1, 1, 1])
    assert row[MICRO_PRICE] == pytest.approx(100), "all size on the bid: at the ask"


def test_quote_without_sizes_has_no_micro_price_and_no_imbalance() -> None:
    (row,) = rows_of([Quote(99.0, 0.0, 101.0, 0.0)])
    assert row[SPREAD] == pytest.approx(200)
    assert row[MICRO_PRICE] == 0
    np.testing.assert_array_equal(row[IMBALANCES], 0)


@pytest.mark.parametrize(("bids", "asks"), [([(50.0, 3.0)], []), ([], [(50.0, 3.0)])])
def test_one_sided_book_has_its_one_price_as_mid(
    bids: list[tuple[float, float]], asks: list[tuple[float, float]]
) -> None:
    rows = rows_of([Trade(40.0, 1.0), Book.from_levels(bids, asks)])
    assert rows[1, MID_RETURN] == pytest.approx(log(50 / 40) * 1e4)
    np.testing.assert_array_equal(rows[1, [0, 20, SPREAD, MICRO_PRICE]], 0)
    np.testing.assert_array_equal(rows[1, IMBALANCES], 1 if bids else -1)


def test_mid_is_the_last_trade_while_there_is_no_book() -> None:
    rows = rows_of([Trade(40.0, 1.0), Trade(50.0, 1.0), Book(b"", b""), Trade(25.0, 1.0)])
    expected = [0, log(50 / 40) * 1e4, 0, log(25 / 50) * 1e4]
    np.testing.assert_allclose(rows[:, MID_RETURN], expected, rtol=1e-6)


def test_empty_book_empties_the_book_channels() -> None:
    rows = rows_of([BOOK, Book(b"", b"")])
    np.testing.assert_array_equal(rows[1, :40], 0)
    np.testing.assert_array_equal(rows[1, SPREAD : IMBALANCES.stop], 0)


def test_sample_is_taken_as_it_is() -> None:
    values = np.arange(50, dtype=np.float32) - 7.5
    rows = rows_of([BOOK, Sample.from_values(values), Trade(100.0, 1.0, "buy")])
    np.testing.assert_array_equal(rows[1], values)
    np.testing.assert_array_equal(rows[2, :40], rows[0, :40])
    assert rows[2, ELAPSED] == pytest.approx(log1p(SECOND_US)), "it is an event all the same"


def test_sample_of_another_size_is_poison() -> None:
    channels = Market50()
    channels.check(MarketEvent("id", "S", "V", 1, Sample.from_values(np.zeros(50))))
    with pytest.raises(PoisonRecord, match="has 50 values, not 49") as poison:
        channels.check(MarketEvent("id", "S", "V", 1, Sample.from_values(np.zeros(49))))
    assert (poison.value.stage, poison.value.reason) == ("window", "bad_sample")


def test_floor_is_the_oldest_event_that_a_row_needs() -> None:
    quote = Quote(1.0, 1, 2.0, 1)
    assert floors_of([BOOK, *[quote] * 30]) == [0] * 31, "the book's deeper levels"
    # Twenty events back for the trade rate, and nothing else.
    assert floors_of([quote] * 30) == [max(0, index - 19) for index in range(30)]
    # A book late in the run: the row after it still needs the mid before, and so what made that.
    assert floors_of([BOOK, *[quote] * 25, BOOK, quote])[-3:] == [0, 0, 8]
    # The last trade's return needs the trade before.
    trade = Trade(1.0, 1.0)
    assert floors_of([trade, trade, *[quote] * 30])[-1] == 0
    assert floors_of([trade, trade, *[quote] * 30, trade, quote])[-2:] == [0, 1]


def test_channel_sets_are_known_by_their_version() -> None:
    assert channel_set("market50-v1").version == "market50-v1"
    assert all(name == kind.version for name, kind in CHANNEL_SETS.items())
    with pytest.raises(ConfigError, match=r"unknown channel set 'market51'; known are market50-v1"):
        channel_set("market51")
    assert (channel_set("market50-v1").empty()["leans"] == NEVER).all()
