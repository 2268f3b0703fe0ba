"""Binance captures: real ones, and small ones that break every rule."""

import gzip
import itertools
import json
from collections import Counter
from pathlib import Path

import pytest

from schemas.messages import Book, MarketEvent, Quote, Trade
from tapeline.sources import SourceStatistics, open_source
from tapeline.sources.orderbook import Diff, OrderBook

FEEDS = Path(__file__).parents[2] / "../shared/data/binance_feeds"
needs_feeds = pytest.mark.skipif(
    not FEEDS.is_dir(), reason="the real captures are not in ../shared/data/binance_feeds"
)
# rows, trades, quotes and depth diffs as counted by a plain loop over the lines, and cases of a
# Book and a Quote at one update id
CAPTURES = {
    "spot_btcusdt_20240808.gz": (41_249, 9_757, 28_040, 3_451, 564),
    "spot_ethusdt_20240808.gz": (33_618, 6_106, 24_077, 3_434, 577),
    "usdm_btcusdt_20240808.gz": (93_954, 21_313, 66_089, 6_551, 629),
    "usdm_ethusdt_20240808.gz": (74_655, 14_076, 53_992, 6_586, 551),
}


def balance(statistics: SourceStatistics) -> bool:
    return statistics.rows == statistics.events + statistics.num_rejected + statistics.num_skipped


def first_lines(name: str, num_lines: int) -> list[bytes]:
    with gzip.open(FEEDS / name) as lines:
        return list(itertools.islice(lines, num_lines))


def update_id(event: MarketEvent) -> int:
    return int(event.event_id.rpartition(":")[2])


@needs_feeds
@pytest.mark.parametrize("name", CAPTURES)
def test_the_book_has_the_venues_own_best_bid_and_ask(name: str) -> None:
    """At every update id that both a diff and a bookTicker end at: price and size, both sides."""
    num_rows, num_trades, num_quotes, num_diffs, num_cases = CAPTURES[name]
    quotes: dict[int, Quote] = {}
    books: dict[int, Book] = {}
    kinds: Counter[type] = Counter()
    ids: set[str] = set()
    time_us = 0
    with open_source(FEEDS / name) as source:
        for number, event in enumerate(source, start=1):
            assert event.sequence == number
            assert event.event_time_us >= time_us
            time_us = event.event_time_us
            ids.add(event.event_id)
            kinds[type(event.payload)] += 1
            if isinstance(event.payload, Quote):
                quotes[update_id(event)] = event.payload
            elif isinstance(event.payload, Book):
                books[update_id(event)] = event.payload
        statistics = source.statistics()
        assert source.bytes_read == source.total_bytes == (FEEDS / name).stat().st_size

    common = quotes.keys() & books.keys()
    assert len(common) == num_cases
    for number in common:
        quote, book = quotes[number], books[number]
        assert (quote.bid_price, quote.bid_size) == (*book.bid_levels[0],)
        assert (quote.ask_price, quote.ask_size) == (*book.ask_levels[0],)

    assert statistics.num_gaps == 0
    assert statistics.rows == num_rows
    assert balance(statistics)
    assert not statistics.rejected
    assert statistics.skipped["snapshot"] == 1
    before = statistics.skipped["before_snapshot"]
    assert kinds == {Trade: num_trades, Quote: num_quotes, Book: num_diffs - before}
    assert len(ids) == statistics.events == num_rows - 1 - before


@needs_feeds
def test_a_lost_diff_is_a_reported_gap(tmp_path: Path) -> None:
    lines = first_lines("usdm_btcusdt_20240808.gz", 4000)
    depth = [i for i, line in enumerate(lines) if b"@depth" in line]
    lost, next_diff = depth[50], depth[51]
    path = tmp_path / "usdm_btcusdt_cut"
    path.write_bytes(b"".join(lines[:lost] + lines[lost + 1 :]))

    with open_source(path) as source:
        events = list(source)
        statistics = source.statistics()

    assert statistics.num_gaps == 1
    missing_from = json.loads(lines[next_diff].partition(b" ")[2])["data"]["pu"]
    assert str(missing_from) in statistics.first_gaps[0]
    assert f":{next_diff}:" in statistics.first_gaps[0]  # its line, one less than before the cut
    assert statistics.skipped["after_gap"] == len(depth) - 51
    assert balance(statistics)
    # Trades and quotes go on, a number is left out where the gap is, and no Book follows it.
    numbers = [event.sequence or 0 for event in events]
    jumps = [i for i, (a, b) in enumerate(itertools.pairwise(numbers)) if b != a + 1]
    assert len(jumps) == 1
    assert numbers[jumps[0] + 1] == numbers[jumps[0]] + 2
    after = {type(event.payload) for event in events[jumps[0] + 1 :]}
    assert after == {Trade, Quote}
    assert any(isinstance(event.payload, Book) for event in events[: jumps[0] + 1])


class Capture:
    """Writes the lines of a small spot capture."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._receive_ns = itertools.count(1_700_000_000_000_000_000, 1_500_000)

    def message(self, message: object) -> None:
        self.lines.append(f"{next(self._receive_ns)} {json.dumps(message)}")

    def stream(self, name: str, content: dict[str, object]) -> None:
        self.message({"stream": f"abcusdt@{name}", "data": {"s": "ABCUSDT"} | content})

    def diff(self, first: int, last: int, bids: object = (), asks: object = ()) -> None:
        self.stream("depth@100ms", {"U": first, "u": last, "b": bids, "a": asks})

    def snapshot(self, update_id: int) -> None:
        self.message({"lastUpdateId": update_id, "bids": [["9.5", "1"]], "asks": [["10.5", "2"]]})

    def trade(self, trade_id: int, **changes: object) -> None:
        content = {"t": trade_id, "p": "10.0", "q": "0.25", "m": True, "M": True}
        self.stream("trade", content | changes)

    def save(self, path: Path) -> Path:
        path.write_text("\n".join(self.lines) + "\n")
        return path


@pytest.fixture
def capture() -> Capture:
    return Capture()


def test_rows_become_events_of_the_receive_clock(capture: Capture, tmp_path: Path) -> None:
    capture.diff(8, 11, bids=[["9.6", "3"]])  # waits for the snapshot, which is inside it
    capture.trade(1)
    capture.snapshot(10)
    capture.stream("bookTicker", {"u": 12, "b": "9.6", "B": "3", "a": "10.5", "A": "2"})
    capture.diff(12, 13, bids=[["9.5", "0"], ["9.4", "7"]], asks=[["10.4", "1"]])
    capture.trade(2, m=False)
    with open_source(capture.save(tmp_path / "capture.log"), "binance") as source:
        sold, quote, book, bought = source

    assert sold.payload == Trade(10.0, 0.25, "sell")
    assert quote.payload == Quote(9.6, 3, 10.5, 2)
    assert book.payload == Book.from_levels([(9.6, 3), (9.4, 7)], [(10.4, 1), (10.5, 2)])
    assert bought.payload == Trade(10.0, 0.25, "buy")
    assert [event.event_time_us - 1_700_000_000_000_000 for event in (sold, quote, book)] == [
        1_500,
        4_500,
        6_000,
    ]
    assert [event.event_id for event in (sold, quote, book)] == [
        "binance-spot:ABCUSDT:trade:1",
        "binance-spot:ABCUSDT:quote:12",
        "binance-spot:ABCUSDT:book:13",
    ]
    assert source.statistics().skipped == {"before_snapshot": 1, "snapshot": 1}


def test_a_new_snapshot_heals_the_book(capture: Capture, tmp_path: Path) -> None:
    capture.snapshot(10)
    capture.diff(11, 12)
    capture.diff(15, 16, bids=[["9.7", "1"]])  # 13 and 14 are lost
    capture.trade(1)
    capture.diff(17, 18)
    capture.snapshot(15)
    capture.diff(10, 11)
    capture.diff(19, 20)
    with open_source(capture.save(tmp_path / "spot_abcusdt.log")) as source:
        before, trade, after = source
    statistics = source.statistics()
    assert statistics.num_gaps == 1
    assert "12" in statistics.first_gaps[0]
    assert "14" in statistics.first_gaps[0]
    assert statistics.skipped == {"snapshot": 2, "after_gap": 2, "stale_diff": 1}
    assert [before.sequence, trade.sequence, after.sequence] == [1, 3, 4]
    assert isinstance(after.payload, Book)
    assert after.payload.bid_levels.tolist() == [[9.7, 1], [9.5, 1]]


def test_wrong_rows_are_rejected_with_line_and_reason(capture: Capture, tmp_path: Path) -> None:
    capture.trade(1)
    capture.lines.append("no capture at all")
    capture.lines.append('1700000000500000000 {"stream":"abcusdt@trade","data":{"s"')
    capture.trade(2, p="NaN")
    capture.trade(3, q="-1")
    capture.trade(4, s="XYZUSDT")
    capture.snapshot(10)
    capture.diff(11, 12, bids=[["9.7", "inf"]])  # refused, so that the next one shows a gap
    capture.diff(13, 14)
    capture.stream("kline_1m", {})
    capture.lines.append("")
    with open_source(capture.save(tmp_path / "spot_abcusdt.log")) as source:
        assert [event.event_id for event in source] == ["binance-spot:ABCUSDT:trade:1"]
    statistics = source.statistics()
    assert statistics.rejected == {
        "malformed": 3,
        "not_finite": 1,
        "negative_size": 1,
        "other_symbol": 1,
    }
    assert [(reject.row, reject.reason) for reject in statistics.first_rejects] == [
        (2, "malformed"),
        (3, "malformed"),
        (4, "not_finite"),
        (5, "negative_size"),
        (6, "other_symbol"),
    ]
    assert statistics.skipped == {"snapshot": 1, "after_gap": 1, "other_stream": 1, "blank": 1}
    assert statistics.num_gaps == 1
    assert balance(statistics)


@pytest.mark.parametrize(
    ("file_name", "given", "changes", "venue"),
    [
        ("a.log", None, {}, "binance-spot"),
        ("a.log", None, {"M": None}, "binance-usdm"),
        ("a.log", None, {"M": None, "s": "ABCUSD_PERP"}, "binance-coinm"),
        ("usdm_abcusdt.gz", None, {}, "binance-usdm"),
        ("usdm_abcusdt.gz", "mine", {}, "mine"),
    ],
)
def test_the_venue_is_given_or_named_or_seen(
    capture: Capture,
    tmp_path: Path,
    file_name: str,
    given: str | None,
    changes: dict[str, object],
    venue: str,
) -> None:
    capture.trade(1, **changes)
    with open_source(capture.save(tmp_path / file_name), "binance", venue=given) as source:
        assert next(source).venue == venue


def diff(after_update_id: int, update_id: int) -> Diff:
    return Diff(after_update_id, update_id, [], [])


@pytest.mark.parametrize(
    ("first", "outcome"),
    [
        (diff(8, 9), "stale"),  # u < lastUpdateId
        (diff(8, 10), "stale"),  # u == lastUpdateId: the snapshot has it
        (diff(8, 11), "applied"),  # U <= lastUpdateId + 1 <= u
        (diff(10, 11), "applied"),
        (diff(11, 12), "gap"),  # 11 is missing
    ],
)
def test_the_first_diff_must_continue_the_snapshot(first: Diff, outcome: str) -> None:
    for snapshot_comes_first in (True, False):
        book = OrderBook()
        if snapshot_comes_first:
            book.apply_snapshot(10, [], [])
            assert book.apply_diff(first) == outcome
        else:
            assert book.apply_diff(first) == "buffered"
            assert (book.apply_snapshot(10, [], []) == "gap") == (outcome == "gap")
        assert book.is_live == (outcome != "gap")


@pytest.mark.parametrize(("after_update_id", "outcome"), [(11, "gap"), (12, "applied")])
def test_each_further_diff_must_continue_the_last(after_update_id: int, outcome: str) -> None:
    book = OrderBook()
    book.apply_snapshot(10, [], [])
    book.apply_diff(diff(10, 12))
    assert book.apply_diff(diff(after_update_id, 14)) == outcome


def test_an_old_snapshot_leaves_a_live_book_alone() -> None:
    book = OrderBook()
    book.apply_snapshot(10, [(9.5, 1)], [])
    book.apply_diff(Diff(10, 12, [(9.5, 2)], []))
    for update_id in (11, 12):
        assert book.apply_snapshot(update_id, [(9.4, 1)], []) == "stale"
    assert book.bids() == [(9.5, 2)]
    assert book.apply_diff(diff(12, 13)) == "applied"


def test_a_buffer_that_overflows_is_a_gap_and_never_a_wrong_book() -> None:
    book = OrderBook(max_buffered_diffs=3)
    for number in range(1, 6):
        book.apply_diff(diff(number, number + 1))
    assert book.statistics().dropped == 2
    assert book.apply_snapshot(1, [], []) == "gap"
    assert not book.is_live


@pytest.mark.parametrize("level", [(0, 1), (-1, 1), (1, -1), (float("nan"), 1), (1, float("inf"))])
def test_a_level_that_no_book_can_hold_is_refused(level: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no book has a level"):
        Diff(1, 2, [level], [])
    with pytest.raises(ValueError, match="no book has a level"):
        OrderBook().apply_snapshot(1, [], [level])
