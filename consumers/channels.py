"""Channel sets: what the model sees of one symbol after each event.

A channel set is a named, versioned, vectorised numpy function. It turns a batch of events, and the
state that their symbols were in, into one row of channels an event, and says for each row the
lowest offset that it leans on, so that a replay knows where to begin (docs/DESIGN.md, 3.3).
docs/channels.md gives every formula and its source.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError, PoisonRecord
from schemas.messages import (
    MAX_BOOK_LEVELS,
    Bar,
    Book,
    MarketEvent,
    Quote,
    Sample,
    Trade,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NEVER = np.int64(2**62)
"""The offset of what was never seen: above every real one, so that it lowers no minimum."""


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """A batch of ``n`` events cut into ``m`` runs, each of one symbol whose state carries on.

    Attributes:
        first: int64, shape (m,): index of each run's first event.
        of: int64, shape (n,): the run of each event.
    """

    first: Ints
    of: Ints

    @classmethod
    def starting(cls, starts: Bools) -> "Segments":
        """Cut before every event where ``starts``, bool (n,), is set; the first must be."""
        return cls(np.flatnonzero(starts), np.cumsum(starts) - 1)

    @property
    def last(self) -> Ints:
        """Index of each run's last event, shape (m,)."""
        return np.append(self.first[1:], len(self.of)) - 1

    def previous(self, values: NDArray[Any], carried: NDArray[Any]) -> NDArray[Any]:
        """Each event's predecessor's value: (n, ...), with (m, ...) carried into the runs."""
        shifted = np.empty_like(values)
        shifted[1:] = values[:-1]
        shifted[self.first] = carried
        return shifted

    def latest(self, indices: Ints, values: NDArray[Any], carried: NDArray[Any]) -> NDArray[Any]:
        """The newest of some events' values as each event of the batch sees it.

        Args:
            indices: int64, shape (k,), rising: the events that have a value.
            values: shape (k, ...): theirs.
            carried: shape (m, ...): what each run begins with.

        Returns:
            shape (n, ...): the event's own value, else the last one in its run, else the carried.
        """
        rank = np.full(len(self.of), -1)
        rank[indices] = np.arange(len(indices))
        rank = np.maximum.accumulate(rank)
        if not len(indices):
            return carried[self.of]
        from_run = (rank >= 0) & (indices[rank] >= self.first[self.of])
        pool = np.concatenate([carried, values])
        return pool[np.where(from_run, len(carried) + rank, self.of)]


class ChannelSet(Protocol):
    """What ``consumers.windows`` asks of a channel set."""

    version: str
    num_channels: int
    state: np.dtype[np.void]
    """One symbol's state."""

    def empty(self) -> NDArray[np.void]:
        """The state of a symbol never seen, shape ()."""

    def check(self, event: MarketEvent) -> None:
        """Raises PoisonRecord for an event that this set cannot turn into a row."""

    def rows(
        self,
        events: Sequence[MarketEvent],
        offsets: Ints,
        times_us: Ints,
        segments: Segments,
        carried: NDArray[np.void],
    ) -> tuple[NDArray[np.float32], Ints, NDArray[np.void]]:
        """Turns ``n`` events in ``m`` runs into rows.

        The result of an event depends on its run alone, never on how events were batched.

        Args:
            carried: shape (m,): the state that each run begins with.

        Returns:
            Rows, float32, (n, C), all finite; the lowest offset that each row leans on, int64,
            (n,), never falling within a run; the state after each run, shape (m,).
        """


class Market50:
    """``market50-v1``: 40 values of the book and 10 derived ones.

    The top of the book is the newer of the last book's best level and the last quote; levels 2 to
    10 are the last book's. A bar counts as a trade at its close. What is missing is 0.
    """

    version = "market50-v1"
    num_channels = 50
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
                ("num_recent", "i8"),
                ("recent_times_us", "i8", (self.recent,)),  # newest last
                ("recent_offsets", "i8", (self.recent,)),
                ("recent_trades", "i8", (self.recent,)),
            ]
        )

    def empty(self) -> NDArray[np.void]:
        state = np.zeros((), self.state)
        state["leans"] = state["recent_offsets"] = NEVER
        return state

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
        events: Sequence[MarketEvent],
        offsets: Ints,
        times_us: Ints,
        segments: Segments,
        carried: NDArray[np.void],
    ) -> tuple[NDArray[np.float32], Ints, NDArray[np.void]]:
        seen = _columns(events)
        old, of, latest = carried["leans"], segments.of, segments.latest

        book = latest(seen.book_at, seen.books, carried["book"])
        quote = latest(seen.quote_at, seen.quotes, carried["quote"])
        trade_runs = of[seen.trade_at]
        trade = latest(seen.trade_at, self._trades(seen, trade_runs, carried), carried["trade"])
        leans = np.stack(
            [
                latest(seen.book_at, offsets[seen.book_at], old[:, 0]),
                latest(seen.quote_at, offsets[seen.quote_at], old[:, 1]),
                latest(seen.trade_at, offsets[seen.trade_at], old[:, 2]),
                latest(
                    seen.trade_at,
                    _previous_in_run(offsets[seen.trade_at], trade_runs, old[:, 2]),
                    old[:, 3],
                ),
            ],
            axis=1,
        )
        newer = (leans[:, 1] != NEVER) & ((leans[:, 1] > leans[:, 0]) | (leans[:, 0] == NEVER))
        book[newer, :, 0] = quote[newer]

        mid = _mid(book, trade[:, 0])
        previous_mid = segments.previous(mid, carried["mid"])
        previous_time = segments.previous(times_us, carried["time_us"])
        has_previous = segments.previous(np.ones(len(mid), bool), carried["num_recent"] > 0)
        rate, oldest_recent, after = self._recent(
            seen.trade_at, offsets, times_us, segments, carried
        )

        rows = np.empty((len(events), self.num_channels))
        rows[:, :40] = _book_channels(book, mid).reshape(-1, 40)
        rows[:, 40] = _log_ratio(mid, previous_mid) * 1e4
        rows[:, 41:46] = _top_channels(book, mid)
        rows[:, 46] = trade[:, 1]
        rows[:, 47] = trade[:, 2] * 1e4
        rows[:, 48] = np.where(has_previous, _log1p_time(times_us - previous_time), 0)
        rows[:, 49] = rate
        rows[seen.sample_at] = seen.samples

        floors = segments.previous(leans, old).min(axis=1)
        floors = np.minimum(floors, leans.min(axis=1))
        floors = np.minimum(np.minimum(floors, oldest_recent), offsets)

        last = segments.last
        after["book"] = latest(seen.book_at, seen.books, carried["book"])[last]
        for name, values in (
            ("quote", quote),
            ("trade", trade),
            ("mid", mid),
            ("leans", leans),
            ("time_us", times_us),
        ):
            after[name] = values[last]
        return rows.astype(np.float32), floors, after

    def _trades(self, seen: "_Columns", runs: Ints, carried: NDArray[np.void]) -> Floats:
        """Price, signed log size and log return since the trade before, shape (k, 3)."""
        price, size, sign = np.ascontiguousarray(seen.trades.T)
        previous = _previous_in_run(price, runs, carried["trade"][:, 0])
        return np.stack([price, sign * np.log1p(size), _log_ratio(price, previous)], axis=1)

    def _recent(
        self,
        trade_at: Ints,
        offsets: Ints,
        times_us: Ints,
        segments: Segments,
        carried: NDArray[np.void],
    ) -> tuple[Floats, Ints, NDArray[np.void]]:
        """The trade rate over the last events, the oldest offset it leans on, the new state.

        Each run is laid behind the ``recent`` events that its state carries; a window over that
        line ends at each event.
        """
        num_runs, num_events, k = len(carried), len(offsets), self.recent
        is_trade = np.zeros(num_events, np.int64)
        is_trade[trade_at] = 1
        at = np.arange(num_events) + k * (segments.of + 1)
        carried_at = (segments.first + k * np.arange(num_runs))[:, None] + np.arange(k)

        def line(name: str, values: Ints) -> Ints:
            joined = np.empty(num_events + k * num_runs, np.int64)
            joined[carried_at] = carried[name]
            joined[at] = values
            return joined

        times = line("recent_times_us", times_us)
        all_offsets = line("recent_offsets", offsets)
        trades = line("recent_trades", is_trade)
        first_known = carried_at[:, -1] + 1 - carried["num_recent"]
        oldest = np.maximum(at - (k - 1), first_known[segments.of])
        counted = np.append(0, np.cumsum(trades))
        span_s = np.maximum(times_us - times[oldest], 1_000) / 1e6
        rate = np.log1p((counted[at + 1] - counted[oldest]) / span_s)

        after = np.zeros(num_runs, self.state)
        sizes = segments.last + 1 - segments.first
        after["num_recent"] = np.minimum(carried["num_recent"] + sizes, k)
        kept = (carried_at[:, -1] + sizes)[:, None] + np.arange(1 - k, 1)
        after["recent_times_us"] = times[kept]
        after["recent_offsets"] = all_offsets[kept]
        after["recent_trades"] = trades[kept]
        return rate, all_offsets[oldest], after


CHANNEL_SETS: dict[str, type[Market50]] = {Market50.version: Market50}


def channel_set(version: str) -> ChannelSet:
    """The channel set of that name. Raises ConfigError naming the known ones."""
    if version not in CHANNEL_SETS:
        raise ConfigError(
            f"unknown channel set {version!r}; known are {', '.join(sorted(CHANNEL_SETS))}"
        )
    return CHANNEL_SETS[version]()


@dataclass(frozen=True, slots=True, eq=False)
class _Columns:
    """A batch's payloads by kind: where they are (rising indices) and what they say."""

    book_at: Ints
    books: Floats  # (k, 4, 10)
    quote_at: Ints
    quotes: Floats  # (k, 4)
    trade_at: Ints
    trades: Floats  # (k, 3): price, size, sign
    sample_at: Ints
    samples: NDArray[np.float32]  # (k, 50)


def _columns(events: Sequence[MarketEvent]) -> _Columns:
    at: dict[type, list[int]] = {Book: [], Quote: [], Trade: [], Sample: []}
    books: list[bytes] = []
    quotes: list[tuple[float, float, float, float]] = []
    trades: list[tuple[float, float, float]] = []
    samples: list[bytes] = []
    for index, event in enumerate(events):
        payload = event.payload
        kind = type(payload)
        match payload:
            case Book(bids, asks):
                books += (bids.ljust(160, b"\0"), asks.ljust(160, b"\0"))
            case Quote(bid_price, bid_size, ask_price, ask_size):
                quotes.append((bid_price, bid_size, ask_price, ask_size))
            case Trade(price, size, side):
                trades.append((price, size, _SIGNS[side]))
            case Bar():
                kind = Trade
                sign = float(payload.close > payload.open) - float(payload.close < payload.open)
                trades.append((payload.close, payload.volume, sign))
            case Sample(values):
                samples.append(values)
        at[kind].append(index)
    sides = np.frombuffer(b"".join(books), "<f8").reshape(-1, 2, MAX_BOOK_LEVELS, 2)
    return _Columns(
        np.array(at[Book], np.int64),
        sides.transpose(0, 1, 3, 2).reshape(-1, 4, MAX_BOOK_LEVELS),
        np.array(at[Quote], np.int64),
        np.array(quotes, np.float64).reshape(-1, 4),
        np.array(at[Trade], np.int64),
        np.array(trades, np.float64).reshape(-1, 3),
        np.array(at[Sample], np.int64),
        np.frombuffer(b"".join(samples), "<f4").reshape(-1, Market50.num_channels),
    )


_SIGNS = {"buy": 1.0, "sell": -1.0, "unknown": 0.0}


def _previous_in_run(values: NDArray[Any], runs: Ints, carried: NDArray[Any]) -> NDArray[Any]:
    """Each of some events' predecessor among them in the same run, else what the run carries."""
    if not len(values):
        return values
    first = np.append(True, runs[1:] != runs[:-1])
    return np.where(first, carried[runs], np.roll(values, 1))


def _mid(book: Floats, trade_price: Floats) -> Floats:
    """The middle of the best prices; the one there is; the last trade's; 0. Shape (n,)."""
    bid, ask = book[:, 0, 0], book[:, 2, 0]
    one_sided = np.where((bid > 0) | (ask > 0), bid + ask, trade_price)
    return np.where((bid > 0) & (ask > 0), (bid + ask) / 2, one_sided)


def _book_channels(book: Floats, mid: Floats) -> Floats:
    """(n, 4, 10): price offsets from the mid in basis points, ln(1 + size)."""
    channels = np.log1p(book)
    for prices in (0, 2):
        channels[:, prices] = _offset_bps(book[:, prices], mid[:, None])
    return channels


def _top_channels(book: Floats, mid: Floats) -> Floats:
    """(n, 5): spread, micro-price offset, imbalance of the first 1, 5 and 10 levels."""
    bid, bid_size, ask, ask_size = (np.ascontiguousarray(side) for side in book[:, :, 0].T)
    two_sided = (bid > 0) & (ask > 0)
    spread = np.where(two_sided, _offset_bps(ask, mid) - _offset_bps(bid, mid), 0)
    sizes = bid_size + ask_size
    micro = _ratio(ask * bid_size + bid * ask_size, sizes)
    micro = np.where(two_sided & (sizes > 0), _offset_bps(micro, mid), 0)
    # Accumulated level by level: a plain sum may add in another order in a batch of another size.
    bids, asks = (np.add.accumulate(book[:, side], axis=1)[:, (0, 4, 9)] for side in (1, 3))
    imbalances = _ratio(bids - asks, bids + asks)
    return np.concatenate([spread[:, None], micro[:, None], imbalances], axis=1)


def _offset_bps(price: Floats, mid: Floats) -> Floats:
    """Basis points from the mid; 0 where there is no price."""
    return np.where(price > 0, _ratio(price - mid, np.broadcast_to(mid, price.shape)), 0) * 1e4


def _ratio(numerator: Floats, denominator: Floats) -> Floats:
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _log_ratio(value: Floats, before: Floats) -> Floats:
    known = (value > 0) & (before > 0)
    return np.log(np.where(known, _ratio(value, before), 1.0))


def _log1p_time(elapsed_us: Ints) -> Floats:
    return np.log1p(np.maximum(elapsed_us, 0).astype(np.float64))
