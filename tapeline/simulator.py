"""A seeded market: order books that live, for demos, tests and load.

Zero intelligence on a grid of ticks, after Cont, Stoikov and Talreja, "A stochastic model for order
book dynamics" (Operations Research 58, 2010): market orders arrive at a constant rate, limit orders
at ``i`` ticks from the opposite best at a rate that falls as ``i ** -0.52``, and what rests is
cancelled in proportion to its size. No clock: the first event's time is an argument.
"""

import heapq
from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate, count, islice, takewhile
from random import Random
from typing import Literal

from schemas.errors import ConfigError
from schemas.messages import Book, MarketEvent, Payload, Quote, Trade
from tapeline.sources.orderbook import BookSide, Level, pack_book

MAX_SYMBOL_CHARS = 40  # the event id holds it, with seed, start and number
_DEPTH_TICKS = 40  # limit orders come this far from the opposite best
_MIN_LEVELS = 12  # of a side; a book that shows 10 levels never runs dry
_LOW_TICKS = 1_000  # nobody sells below, so that prices stay positive
# Shares of market, limit and cancel orders in a book of the usual size. As many lots come as go:
# limit = market + cancel. Market orders often find less than they want, so that 31 % are trades.
_MARKET, _LIMIT, _CANCEL = 0.36, 0.50, 0.14
_USUAL_LOTS = 2_500.0  # resting on both sides
_MEAN_ORDER_LOTS = 10.0
_DISTANCES = list(accumulate(ticks**-0.52 for ticks in range(1, _DEPTH_TICKS + 1)))

_Side = Literal["buy", "sell"]


def symbol_names(num_symbols: int) -> list[str]:
    """``SIM01``, ``SIM02``, …: names for whoever has none."""
    if num_symbols < 1:
        raise ConfigError(f"a simulation needs at least 1 symbol, not {num_symbols}")
    return [f"SIM{number:02d}" for number in range(1, num_symbols + 1)]


def simulate(
    *,
    symbols: Sequence[str],
    seed: int,
    start_time_us: int,
    rate_hz: float = 1_000.0,
    num_events: int | None = None,
    duration_s: float | None = None,
    venue: str = "sim",
    tick_size: float = 0.01,
) -> Iterator[MarketEvent]:
    """An endless tape, ended by ``num_events`` or ``duration_s``, whichever comes first.

    About 30 % trades and 70 % quotes and books of 10 levels. The same arguments give the same
    events, byte for byte; another seed or start gives others, ids included. Event times never go
    back, and rise per symbol; sequences count from 1 per symbol without a hole.

    Args:
        rate_hz: events per second of event time, all symbols together; the first symbol is the
            most active, the n-th has ``n ** -0.5`` of its rate.

    Raises:
        ConfigError: at the call, for arguments that make no market.
    """
    _check(symbols, venue, start_time_us, rate_hz, num_events, duration_s, tick_size)
    weights = [rank**-0.5 for rank in range(1, len(symbols) + 1)]
    tapes = [
        _tape(
            _Market(Random(f"{seed}:{symbol}"), tick_size=tick_size),
            symbol=symbol,
            venue=venue,
            id_prefix=f"{venue}:{seed}:{start_time_us}:{symbol}",
            start_time_us=start_time_us,
            rate_hz=rate_hz * weight / sum(weights),
        )
        for symbol, weight in zip(symbols, weights, strict=True)
    ]
    events: Iterator[MarketEvent] = heapq.merge(*tapes, key=lambda event: event.event_time_us)
    if duration_s is not None:
        end_us = start_time_us + round(duration_s * 1e6)
        events = takewhile(lambda event: event.event_time_us < end_us, events)
    return islice(events, num_events)


def _tape(
    market: "_Market",
    *,
    symbol: str,
    venue: str,
    id_prefix: str,
    start_time_us: int,
    rate_hz: float,
) -> Iterator[MarketEvent]:
    """One symbol's endless events: a Poisson stream of orders and what each one shows."""
    arrival_us = float(start_time_us)
    event_time_us = start_time_us - 1
    for sequence in count(1):
        arrival_us += market.random.expovariate(rate_hz) * 1e6
        event_time_us = max(event_time_us + 1, int(arrival_us))
        yield MarketEvent(
            event_id=f"{id_prefix}:{sequence}",
            symbol=symbol,
            venue=venue,
            event_time_us=event_time_us,
            payload=market.next_order(),
            sequence=sequence,
        )


class _Market:
    """One symbol's book, in whole ticks and lots, moved on by one order at a time.

    Invariant: the best bid is below the best ask; a side has at least ``_MIN_LEVELS`` levels.
    """

    def __init__(self, random: Random, *, tick_size: float) -> None:
        self.random = random
        self._tick_size = tick_size
        # The far end falls off as the price walks away from it.
        self._bids = BookSide(rising=False, max_levels=2 * _DEPTH_TICKS)
        self._asks = BookSide(rising=True, max_levels=2 * _DEPTH_TICKS)
        middle = random.randint(5_000, 50_000)
        for ticks in range(1, _DEPTH_TICKS + 1):
            self._bids.update([(middle - ticks, self._lots())])
            self._asks.update([(middle + ticks, self._lots())])

    def next_order(self) -> Payload:
        """What the next order shows: its trade, else the quote if that moved, else the book."""
        resting = self._bids.total_size + self._asks.total_size
        draw = self.random.random() * (_MARKET + _LIMIT + _CANCEL * resting / _USUAL_LOTS)
        side: _Side = "buy" if self.random.random() < 0.5 else "sell"
        if draw < _MARKET:
            return self._execute(side)
        touch = self._touch()
        if draw < _MARKET + _LIMIT:
            self._rest(side)
        else:
            self._cancel(side)
        bid, ask = self._touch()
        if (bid, ask) != touch:
            return Quote(*self._scaled(bid), *self._scaled(ask))
        return self._book()

    def _execute(self, side: _Side) -> Trade:
        """A market order; what the best level cannot fill is given up."""
        bid, ask = self._touch()
        if bid[0] <= _LOW_TICKS:
            side = "buy"
        price, resting = ask if side == "buy" else bid
        lots = min(resting, self._lots())
        self._remove(self._asks if side == "buy" else self._bids, price, resting, lots)
        return Trade(*self._scaled((price, lots)), side)

    def _rest(self, side: _Side) -> None:
        """A limit order, some ticks away from the opposite best."""
        ticks = bisect(_DISTANCES, self.random.random() * _DISTANCES[-1]) + 1
        (bid, _), (ask, _) = self._touch()
        book_side, price = (self._bids, ask - ticks) if side == "buy" else (self._asks, bid + ticks)
        book_side.update([(price, book_side.size_at(price) + self._lots())])

    def _cancel(self, side: _Side) -> None:
        book_side = self._bids if side == "buy" else self._asks
        levels = book_side.best(_DEPTH_TICKS)
        price, resting = levels[int(self.random.random() * len(levels))]
        self._remove(book_side, price, resting, min(resting, self._lots()))

    def _remove(self, book_side: BookSide, price: float, resting: float, lots: float) -> None:
        book_side.update([(price, resting - lots)])
        if len(book_side) < _MIN_LEVELS:
            worst = book_side.best(_MIN_LEVELS)[-1][0]
            outward = 1 if book_side is self._asks else -1
            book_side.update([(worst + outward, self._lots())])

    def _lots(self) -> float:
        return 1.0 + int(self.random.expovariate(1 / (_MEAN_ORDER_LOTS - 0.5)))

    def _touch(self) -> tuple[Level, Level]:
        return self._bids.best(1)[0], self._asks.best(1)[0]

    def _book(self) -> Book:
        return pack_book(
            [self._scaled(level) for level in self._bids.best()],
            [self._scaled(level) for level in self._asks.best()],
        )

    def _scaled(self, level: Level) -> Level:
        """Ticks and lots as price and size; rounded, so that prices print as a venue's do."""
        return round(level[0] * self._tick_size, 10), level[1] / 100


def _check(
    symbols: Sequence[str],
    venue: str,
    start_time_us: int,
    rate_hz: float,
    num_events: int | None,
    duration_s: float | None,
    tick_size: float,
) -> None:
    if not symbols or len(set(symbols)) < len(symbols):
        raise ConfigError("a simulation needs at least 1 symbol, and none of them twice")
    for name in (*symbols, venue):
        if not 0 < len(name) <= MAX_SYMBOL_CHARS:
            raise ConfigError(
                f"symbol or venue {name!r} must have 1 to {MAX_SYMBOL_CHARS} characters"
            )
    for name, value in (("rate_hz", rate_hz), ("tick_size", tick_size)):
        if not 0 < value < 1e9:
            raise ConfigError(f"{name} must be a positive number, not {value}")
    if start_time_us <= 0:
        raise ConfigError(f"start_time_us must be after 1970, not {start_time_us}")
    if num_events is not None and num_events < 0:
        raise ConfigError(f"num_events must not be negative, not {num_events}")
    if duration_s is not None and not 0 < duration_s < 1e9:
        raise ConfigError(f"duration_s must be a positive number of seconds, not {duration_s}")
