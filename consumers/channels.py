"""Channel sets: what the model sees of one symbol after each event.

A channel set is a named, versioned, compiled function. It turns events, one after another, and the
state that their symbols are in into one row of channels an event, and says for each row the lowest
offset that it leans on, so that a replay knows where to begin (docs/DESIGN.md, 3.3).
docs/channels.md gives every formula and its source.
"""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from consumers.columns import BAR, BOOK, NUM_VALUES, QUOTE, SAMPLE, TRADE, EventColumns
from consumers.compiled import compiled
from schemas.errors import ConfigError, PoisonRecord
from schemas.messages import MAX_BOOK_LEVELS, MarketEvent, Sample

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NEVER = np.int64(2**62)
"""The offset of what was never seen: above every real one, so that it lowers no minimum."""


class ChannelSet(Protocol):
    """What ``consumers.windows`` asks of a channel set."""

    version: str
    num_channels: int
    state: np.dtype[np.void]
    """One symbol's state."""

    def empty(self) -> NDArray[np.void]:
        """The state of a symbol never seen, shape (1,)."""

    def check(self, event: MarketEvent) -> None:
        """Raises PoisonRecord for an event that this set cannot turn into a row."""

    def rows(
        self,
        events: EventColumns,
        offsets: Ints,
        slots: Ints,
        emptied: Bools,
        states: NDArray[np.void],
    ) -> tuple[NDArray[np.float32], Ints]:
        """Turns ``n`` events into rows, in their order.

        Args:
            offsets: int64, (n,).
            slots: int64, (n,): where in ``states`` each event's symbol is.
            emptied: bool, (n,): its symbol begins anew with this event.
            states: changed in place.

        Returns:
            Rows, float32, (n, C), all finite; and the lowest offset that each row leans on, int64,
            (n,), never falling from one row of a symbol to its next.
        """


class Market50:
    """``market50-v1``: 40 values of the book and 10 derived ones.

    The top of the book is the newer of the last book's best level and the last quote; levels 2 to
    10 are the last book's. A bar counts as a trade at its close. What is missing is 0.
    """

    version = "market50-v1"
    num_channels = NUM_VALUES
    recent = 20  # events that the trade rate looks back on, the newest included

    def __init__(self) -> None:
        self.state = np.dtype(
            [
                ("book", "f8", (4, MAX_BOOK_LEVELS)),  # bid price, bid size, ask price, ask size
                ("quote", "f8", (4,)),
                ("trade", "f8", (3,)),  # price, signed log size, log return
                ("mid", "f8"),
                ("leans", "i8", (4,)),  # offsets: book, quote, trade, the trade before it
                ("time_us", "i8"),
                ("num_events", "i8"),  # since it began
                ("recent_times_us", "i8", (self.recent,)),  # each at its event's number
                ("recent_offsets", "i8", (self.recent,)),
                ("recent_trades", "i8", (self.recent,)),
            ]
        )
        self._empty = np.zeros(1, self.state)
        self._empty["leans"] = NEVER

    def empty(self) -> NDArray[np.void]:
        return self._empty.copy()

    def check(self, event: MarketEvent) -> None:
        payload = event.payload
        if isinstance(payload, Sample) and len(payload.values) != 4 * self.num_channels:
            raise PoisonRecord(
                "window",
                "bad_sample",
                f"a sample for {self.version} has {self.num_channels} values, "
                f"not {len(payload.values) // 4}",
            )

    def rows(
        self,
        events: EventColumns,
        offsets: Ints,
        slots: Ints,
        emptied: Bools,
        states: NDArray[np.void],
    ) -> tuple[NDArray[np.float32], Ints]:
        rows = np.empty((len(offsets), self.num_channels), np.float32)
        floors = np.empty(len(offsets), np.int64)
        _rows(
            events.times_us,
            events.kinds,
            events.values,
            offsets,
            slots,
            emptied,
            states,
            self._empty,
            self.recent,
            rows,
            floors,
        )
        return rows, floors


CHANNEL_SETS: dict[str, type[Market50]] = {Market50.version: Market50}


def channel_set(version: str) -> ChannelSet:
    """The channel set of that name. Raises ConfigError naming the known ones."""
    if version not in CHANNEL_SETS:
        raise ConfigError(
            f"unknown channel set {version!r}; known are {', '.join(sorted(CHANNEL_SETS))}"
        )
    return CHANNEL_SETS[version]()


# market50-v1, an event at a time.


@compiled
def _rows(
    times_us: Ints,
    kinds: NDArray[np.uint8],
    values: NDArray[np.float64],
    offsets: Ints,
    slots: Ints,
    emptied: Bools,
    states: NDArray[np.void],
    empty: NDArray[np.void],
    recent: int,
    rows: NDArray[np.float32],
    floors: Ints,
) -> None:
    top = np.empty(4)
    for index in range(len(offsets)):
        slot, offset, time_us = slots[index], offsets[index], times_us[index]
        if emptied[index]:
            states[slot] = empty[0]
        state, row = states[slot], rows[index]
        leans = state.leans
        floor = min(offset, leans.min())  # the mid before leans on them
        mid_before, is_first = state.mid, state.num_events == 0
        _take(state, kinds[index], values[index], offset)
        _look_at_top(state, top)
        mid = _mid(top[0], top[2], state.trade[0])
        rate, oldest = _trade_rate(state, kinds[index], offset, time_us, recent)
        floors[index] = min(floor, leans.min(), oldest)
        if kinds[index] == SAMPLE:
            row[:] = values[index]
        else:
            _fill_book(row, state.book, top, mid)
            row[40] = _log_ratio(mid, mid_before) * 1e4
            _fill_top(row, state.book, top, mid)
            row[46] = state.trade[1]
            row[47] = state.trade[2] * 1e4
            row[48] = 0.0 if is_first else np.log1p(float(max(time_us - state.time_us, 0)))
            row[49] = rate
        state.mid = mid
        state.time_us = time_us


@compiled
def _take(state: Any, kind: int, values: NDArray[np.float64], offset: int) -> None:
    """What the event says becomes the newest that is known."""
    leans = state.leans
    if kind == BOOK:
        for side in range(4):
            for level in range(MAX_BOOK_LEVELS):
                state.book[side, level] = values[MAX_BOOK_LEVELS * side + level]
        leans[0] = offset
    elif kind == QUOTE:
        for place in range(4):
            state.quote[place] = values[place]
        leans[1] = offset
    elif kind == TRADE:
        _take_trade(state, values[0], values[1], values[2], offset)
    elif kind == BAR:
        sign = np.sign(values[3] - values[0])
        _take_trade(state, values[3], values[4], sign, offset)


@compiled
def _take_trade(state: Any, price: float, size: float, sign: float, offset: int) -> None:
    state.trade[2] = _log_ratio(price, state.trade[0])
    state.trade[1] = sign * np.log1p(size)
    state.trade[0] = price
    state.leans[3] = state.leans[2]
    state.leans[2] = offset


@compiled
def _look_at_top(state: Any, top: NDArray[np.float64]) -> None:
    """Best bid price and size, ask price and size: the newer of quote and book."""
    book_at, quote_at = state.leans[0], state.leans[1]
    is_quote_newer = quote_at != NEVER and (book_at == NEVER or quote_at > book_at)
    for place in range(4):
        top[place] = state.quote[place] if is_quote_newer else state.book[place, 0]


@compiled
def _mid(bid: float, ask: float, trade_price: float) -> float:
    """The middle of the best prices; the one there is; the last trade's; 0."""
    if bid > 0 and ask > 0:
        return (bid + ask) / 2
    return bid + ask if bid > 0 or ask > 0 else trade_price


@compiled
def _trade_rate(state: Any, kind: int, offset: int, time_us: int, recent: int) -> tuple[float, int]:
    """ln(1 + trades a second) over the newest events, this one included; the oldest's offset."""
    place = state.num_events % recent
    state.recent_times_us[place] = time_us
    state.recent_offsets[place] = offset
    state.recent_trades[place] = kind in (TRADE, BAR)
    state.num_events += 1
    num = min(state.num_events, recent)
    oldest = (state.num_events - num) % recent
    num_trades = 0
    for back in range(num):
        num_trades += state.recent_trades[back]
    span_s = max(time_us - state.recent_times_us[oldest], 1_000) / 1e6
    return np.log1p(num_trades / span_s), state.recent_offsets[oldest]


@compiled
def _fill_book(
    row: NDArray[np.float32], book: NDArray[np.float64], top: NDArray[np.float64], mid: float
) -> None:
    """Channels 0 to 39: price offsets from the mid in basis points, ln(1 + size)."""
    for side in range(4):
        for level in range(MAX_BOOK_LEVELS):
            value = top[side] if level == 0 else book[side, level]
            row[MAX_BOOK_LEVELS * side + level] = (
                np.log1p(value) if side % 2 else _offset_bps(value, mid)
            )


@compiled
def _fill_top(
    row: NDArray[np.float32], book: NDArray[np.float64], top: NDArray[np.float64], mid: float
) -> None:
    """Channels 41 to 45: spread, micro-price offset, imbalance of the first 1, 5 and 10 levels."""
    bid, bid_size, ask, ask_size = top
    row[41] = row[42] = 0.0
    if bid > 0 and ask > 0:
        row[41] = _offset_bps(ask, mid) - _offset_bps(bid, mid)
        if bid_size + ask_size > 0:
            micro = (ask * bid_size + bid * ask_size) / (bid_size + ask_size)
            row[42] = _offset_bps(micro, mid)
    row[43] = _imbalance(bid_size, ask_size)
    bids, asks = bid_size, ask_size
    for level in range(1, MAX_BOOK_LEVELS):
        bids += book[1, level]
        asks += book[3, level]
        if level == 4:
            row[44] = _imbalance(bids, asks)
    row[45] = _imbalance(bids, asks)


@compiled
def _imbalance(bids: float, asks: float) -> float:
    return (bids - asks) / (bids + asks) if bids + asks > 0 else 0.0


@compiled
def _offset_bps(price: float, mid: float) -> float:
    """Basis points from the mid; 0 where there is no price."""
    return (price - mid) / mid * 1e4 if price > 0 and mid > 0 else 0.0


@compiled
def _log_ratio(value: float, before: float) -> float:
    return np.log(value / before) if value > 0 and before > 0 else 0.0
