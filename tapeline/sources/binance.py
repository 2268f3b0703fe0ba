"""Raw Binance websocket captures: trades, best bid and ask, and books rebuilt from depth diffs.

A line is ``<local receive time, ns> <JSON>``, the JSON as the combined stream sent it
(``{"stream": ..., "data": ...}``) or the REST depth snapshot. A file holds one symbol of a market.
"""

import re
from typing import Final

import msgspec

from schemas.messages import InvalidEvent, MarketEvent, Payload, Quote, Trade
from tapeline.sources.orderbook import Diff, OrderBook
from tapeline.sources.source import ReaderRequest, Rows, read_lines

FILE_NAMES: Final = re.compile(r"(spot|usdm|cm)_\w+?(\.txt|\.log)?(\.gz)?$", re.IGNORECASE)
_VENUES: Final = {"spot": "binance-spot", "usdm": "binance-usdm", "cm": "binance-coinm"}

Level = tuple[float, float]


class _Line(msgspec.Struct, rename={"last_update_id": "lastUpdateId"}):
    stream: str = ""
    data: msgspec.Raw = msgspec.Raw(b"null")
    last_update_id: int | None = None
    bids: list[Level] = []
    asks: list[Level] = []


class _Trade(msgspec.Struct):
    s: str
    t: int
    p: float
    q: float
    m: bool  # the buyer is the maker
    M: bool | None = None  # on spot only


class _Ticker(msgspec.Struct):
    s: str
    u: int
    b: float
    B: float
    a: float
    A: float
    e: str | None = None  # on futures only


class _Depth(msgspec.Struct):
    s: str
    U: int
    u: int
    b: list[Level]
    a: list[Level]
    pu: int | None = None  # on futures only


# Numbers arrive as strings; msgspec turns them into floats while it parses.
_decode_line = msgspec.json.Decoder(_Line, strict=False).decode
_decode_trade = msgspec.json.Decoder(_Trade, strict=False).decode
_decode_ticker = msgspec.json.Decoder(_Ticker, strict=False).decode
_decode_depth = msgspec.json.Decoder(_Depth, strict=False).decode


def read_binance(request: ReaderRequest) -> Rows:
    """The events of one capture, in the order of their arrival.

    Every event takes the *local receive time* as its event time. Trades and diffs also carry the
    exchange's clock, but spot's best bid and ask does not, and the two clocks differ (by 1.27 s in
    the captures that we know): mixing them would shuffle the tape. The receive time is on all lines
    and never goes back.

    A Book follows each diff that continues the book; trades and quotes need no snapshot. The reader
    numbers all events of the file; a hole in the depth stream leaves out one number, and there are
    no more Books until a snapshot that heals it.
    """
    capture = _Capture(request)
    for row, line in read_lines(request):
        try:
            event = capture.event(row, line)
        except InvalidEvent as error:
            request.tally.reject(request.path, row, error.reason, str(error))
        except (msgspec.DecodeError, ValueError) as error:
            request.tally.reject(request.path, row, "malformed", str(error))
        else:
            if event is not None:
                yield row, event


class _Capture:
    """What must be remembered from line to line: the symbol, the venue and the book."""

    def __init__(self, request: ReaderRequest) -> None:
        self._request = request
        self._symbol = ""
        self._venue = request.venue or _venue_by_name(request.path.name)
        self._book = OrderBook()

    def event(self, row: int, line: bytes) -> MarketEvent | None:
        """None for a row that is no event of its own. Raises ValueError for one that is wrong."""
        receive_ns, _, text = line.partition(b" ")
        event_time_us = int(receive_ns) // 1000
        message = _decode_line(text)
        if message.last_update_id is not None:
            self._snapshot(row, message.last_update_id, message)
            return None
        stream = message.stream.partition("@")[2].partition("@")[0]
        match stream:
            case "trade":
                return self._trade(event_time_us, message.data)
            case "bookTicker":
                return self._quote(event_time_us, message.data)
            case "depth":
                return self._diff(row, event_time_us, message.data)
        self._request.tally.skip("other_stream")
        return None

    def _trade(self, event_time_us: int, text: msgspec.Raw) -> MarketEvent:
        trade = _decode_trade(text)
        # The maker's order waited in the book: if that was the buyer, the seller was aggressive.
        payload = Trade(trade.p, trade.q, "sell" if trade.m else "buy")
        self._meet(trade.s, is_spot=trade.M is not None)
        return self._event("trade", trade.t, event_time_us, payload)

    def _quote(self, event_time_us: int, text: msgspec.Raw) -> MarketEvent:
        ticker = _decode_ticker(text)
        self._meet(ticker.s, is_spot=ticker.e is None)
        quote = Quote(ticker.b, ticker.B, ticker.a, ticker.A)
        return self._event("quote", ticker.u, event_time_us, quote)

    def _diff(self, row: int, event_time_us: int, text: msgspec.Raw) -> MarketEvent | None:
        depth = _decode_depth(text)
        self._meet(depth.s, is_spot=depth.pu is None)
        after = depth.U - 1 if depth.pu is None else depth.pu
        outcome = self._book.apply_diff(Diff(after, depth.u, depth.b, depth.a))
        if outcome == "applied":
            return self._event("book", depth.u, event_time_us, self._book.top())
        if outcome == "gap":
            self._report_gap(row)
        if outcome == "stale":
            self._request.tally.skip("stale_diff")
        else:
            self._request.tally.skip("after_gap" if self._book.gaps else "before_snapshot")
        return None

    def _snapshot(self, row: int, update_id: int, message: _Line) -> None:
        if self._book.apply_snapshot(update_id, message.bids, message.asks) == "gap":
            self._report_gap(row)
        self._request.tally.skip("snapshot")

    def _report_gap(self, row: int) -> None:
        path, tally = self._request.path, self._request.tally
        tally.gap(f"{path.name}:{row}: depth gap: {self._book.gaps[-1]}")
        tally.jump(self._venue, self._symbol)

    def _meet(self, symbol: str, *, is_spot: bool) -> None:
        """Learns symbol and venue from the first row that shows them."""
        if symbol == self._symbol:
            return
        if self._symbol:
            raise InvalidEvent(
                "other_symbol", f"{symbol} in a capture of {self._symbol}; split it by symbol"
            )
        self._symbol = symbol
        if not self._venue:
            market = "spot" if is_spot else "cm" if "USD_" in symbol else "usdm"
            self._venue = _VENUES[market]

    def _event(self, kind: str, number: int, event_time_us: int, payload: Payload) -> MarketEvent:
        return MarketEvent(
            event_id=f"{self._venue}:{self._symbol}:{kind}:{number}",
            symbol=self._symbol,
            venue=self._venue,
            event_time_us=event_time_us,
            payload=payload,
        )


def _venue_by_name(file_name: str) -> str:
    named = FILE_NAMES.match(file_name)
    return _VENUES[named[1].lower()] if named else ""
