"""An order book rebuilt from one snapshot and a stream of diffs, by Binance's documented rules.

https://developers.binance.com/docs/binance-spot-api-docs/web-socket-streams and
https://developers.binance.com/docs/derivatives/usds-margined-futures/websocket-market-streams,
"How to manage a local order book correctly". Pure: no file, no clock, no JSON.
"""

import struct
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Literal

from schemas.messages import MAX_BOOK_LEVELS, Book

Level = tuple[float, float]  # price, size
Outcome = Literal["applied", "buffered", "stale", "gap"]

_PACK = [struct.Struct(f"<{2 * levels}d").pack for levels in range(MAX_BOOK_LEVELS + 1)]


@dataclass(frozen=True, slots=True)
class Diff:
    """New absolute sizes of some levels; size 0 deletes a level.

    Attributes:
        after_update_id: the update that this diff follows: ``U - 1`` on spot, ``pu`` on futures,
            where one id counter serves all symbols and ``U`` may be far above ``pu``.
        update_id: the last update in it, ``u``.
    """

    after_update_id: int
    update_id: int
    bids: Sequence[Level]
    asks: Sequence[Level]

    def __post_init__(self) -> None:
        """Raises ValueError: a refused diff leaves the book untouched, and the next one tells."""
        if self.after_update_id >= self.update_id:
            raise ValueError(f"diff ends at {self.update_id}, before it starts")
        check_levels(self.bids)
        check_levels(self.asks)


@dataclass(frozen=True, slots=True)
class Gap:
    """Updates that are missing: the book was at ``update_id``, the diff follows another one."""

    update_id: int
    after_update_id: int

    def __str__(self) -> str:
        return f"the book is at update {self.update_id}, the diff follows {self.after_update_id}"


@dataclass(frozen=True, slots=True)
class OrderBookStatistics:
    """What became of every diff. ``buffered`` ones wait for a snapshot."""

    snapshots: int
    applied: int
    stale: int
    buffered: int
    dropped: int
    gaps: int


class BookSide:
    """One side of a book: price levels, the best always at hand.

    Keys are kept ascending and the best is last, so that a change near the touch moves few of them;
    an ask's key is its negative price. Levels beyond ``max_levels`` from the best are forgotten.
    """

    def __init__(self, *, rising: bool, max_levels: int = 20_000) -> None:
        assert max_levels >= 1
        self._sign = -1.0 if rising else 1.0
        self._max_levels = max_levels
        self._keys: list[float] = []
        self._sizes: dict[float, float] = {}

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def total_size(self) -> float:
        return sum(self._sizes.values())

    def size_at(self, price: float) -> float:
        """0 where there is no level."""
        return self._sizes.get(self._sign * price, 0.0)

    def update(self, levels: Sequence[Level]) -> None:
        sign, keys, sizes = self._sign, self._keys, self._sizes
        for price, size in levels:
            key = sign * price
            if not size:
                # Deleting a level that we never saw is normal: the snapshot shows 1000 a side.
                if sizes.pop(key, None) is not None:
                    del keys[bisect_left(keys, key)]
                continue
            if key not in sizes:
                insort(keys, key)
            sizes[key] = size
        while len(keys) > self._max_levels:
            del sizes[keys.pop(0)]

    def replace(self, levels: Sequence[Level]) -> None:
        self._keys.clear()
        self._sizes.clear()
        self.update(levels)

    def best(self, num_levels: int = MAX_BOOK_LEVELS) -> list[Level]:
        """At most ``num_levels`` of (price, size), best first."""
        sign, sizes = self._sign, self._sizes
        return [(sign * key, sizes[key]) for key in self._keys[: -num_levels - 1 : -1]]


class OrderBook:
    """The book of one symbol: waits for a snapshot, follows the diffs, stops at a gap.

    Invariant: while ``is_live``, the levels are the venue's at ``update_id``, as far as snapshot
    and diffs showed them. Diffs that come before the snapshot are buffered, as the venue asks for:
    the snapshot is often older than the diff that arrived just before it. After a gap the book is
    not live, and diffs are buffered again, until a snapshot that they continue.

    Args:
        max_buffered_diffs: the oldest is dropped beyond it. A buffer that then no longer continues
            the snapshot is a gap like any other, never a wrong book.
    """

    def __init__(self, *, max_buffered_diffs: int = 1000) -> None:
        assert max_buffered_diffs >= 1
        self.update_id = 0
        self.is_live = False
        self.gaps: deque[Gap] = deque(maxlen=100)
        self._bids = BookSide(rising=False)
        self._asks = BookSide(rising=True)
        self._buffer: deque[Diff] = deque(maxlen=max_buffered_diffs)
        self._is_first = False  # the next diff is the first one after a snapshot
        self._snapshots = self._applied = self._stale = self._dropped = self._num_gaps = 0

    def apply_snapshot(
        self, update_id: int, bids: Sequence[Level], asks: Sequence[Level]
    ) -> Outcome:
        """Starts or restarts the book, then applies the buffered diffs.

        ``stale`` if the live book is already past it; ``gap`` if the buffered diffs do not continue
        it, and the book waits for a newer one. Raises ValueError for numbers that no book can hold.
        """
        check_levels(bids)
        check_levels(asks)
        self._snapshots += 1
        if self.is_live and update_id <= self.update_id:
            return "stale"
        self._bids.replace(bids)
        self._asks.replace(asks)
        self.update_id = update_id
        self.is_live = self._is_first = True
        waiting = list(self._buffer)
        self._buffer.clear()
        outcomes = [self.apply_diff(diff) for diff in waiting]
        return "gap" if "gap" in outcomes else "applied"

    def apply_diff(self, diff: Diff) -> Outcome:
        """``gap``: the diff does not continue the book, which is not live from here on."""
        if not self.is_live:
            self._wait(diff)
            return "buffered"
        if diff.update_id <= self.update_id:
            self._stale += 1
            return "stale"
        # A snapshot may fall inside the first diff (sizes are absolute, so applying it again is
        # harmless). Futures' rule says U <= lastUpdateId; between pu and U there is no update of
        # this symbol, so pu <= lastUpdateId says the same and also takes a snapshot just before U.
        follows = (
            diff.after_update_id <= self.update_id
            if self._is_first
            else diff.after_update_id == self.update_id
        )
        if not follows:
            self.gaps.append(Gap(self.update_id, diff.after_update_id))
            self._num_gaps += 1
            self.is_live = False
            self._wait(diff)
            return "gap"
        self._is_first = False
        self._bids.update(diff.bids)
        self._asks.update(diff.asks)
        self.update_id = diff.update_id
        self._applied += 1
        return "applied"

    def _wait(self, diff: Diff) -> None:
        if len(self._buffer) == self._buffer.maxlen:
            self._dropped += 1
        self._buffer.append(diff)

    def bids(self, num_levels: int = MAX_BOOK_LEVELS) -> list[Level]:
        """(price, size), best first."""
        return self._bids.best(num_levels)

    def asks(self, num_levels: int = MAX_BOOK_LEVELS) -> list[Level]:
        """(price, size), best first."""
        return self._asks.best(num_levels)

    def top(self) -> Book:
        """The best 10 levels a side, as a payload."""
        assert self.is_live
        return pack_book(self._bids.best(), self._asks.best())

    def statistics(self) -> OrderBookStatistics:
        return OrderBookStatistics(
            snapshots=self._snapshots,
            applied=self._applied,
            stale=self._stale,
            buffered=len(self._buffer),
            dropped=self._dropped,
            gaps=self._num_gaps,
        )


def pack_book(bids: Sequence[Level], asks: Sequence[Level]) -> Book:
    """``Book.from_levels`` for at most 10 levels a side, several times faster than by numpy."""
    return Book(
        _PACK[len(bids)](*[number for level in bids for number in level]),
        _PACK[len(asks)](*[number for level in asks for number in level]),
    )


def check_levels(levels: Sequence[Level]) -> None:
    """Raises ValueError unless each price is positive, each size at least 0, and all finite."""
    for price, size in levels:
        if not (0 < price < inf and 0 <= size < inf):
            raise ValueError(f"no book has a level of price {price} and size {size}")
