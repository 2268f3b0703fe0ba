"""The windows of a capture, computed a second time: one event after another, no Tapeline code.

Straight from the file with a dict for a book and the formulas of docs/channels.md, so that a
mistake in the readers, the channels or the windows cannot hide in both.
"""

import gzip
import json
import math
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_STEPS = 60


def capture_events(path: Path) -> Iterator[tuple[str, int, str, Any]]:
    """Event id, time in microseconds, kind and values of each event in a Binance capture."""
    venue = "binance-spot" if path.name.startswith("spot") else "binance-usdm"
    bids: dict[float, float] = {}
    asks: dict[float, float] = {}
    waiting: list[dict[str, Any]] | None = []
    last_id = 0

    def apply(diff: dict[str, Any]) -> None:
        for side, levels in ((bids, diff["b"]), (asks, diff["a"])):
            for price, size in ((float(p), float(q)) for p, q in levels):
                if size:
                    side[price] = size
                else:
                    side.pop(price, None)

    for line in gzip.decompress(path.read_bytes()).decode().splitlines():
        stamp, _, text = line.partition(" ")
        message, time_us = json.loads(text), int(stamp) // 1000
        if "lastUpdateId" in message:
            bids.update((float(p), float(q)) for p, q in message["bids"])
            asks.update((float(p), float(q)) for p, q in message["asks"])
            last_id = message["lastUpdateId"]
            for diff in waiting or ():
                if diff["u"] > last_id:
                    apply(diff)
            waiting = None
            continue
        kind, body = message["stream"].partition("@")[2].partition("@")[0], message["data"]
        prefix = f"{venue}:{body['s']}"
        if kind == "trade":
            sign = -1.0 if body["m"] else 1.0
            values = (float(body["p"]), float(body["q"]), sign)
            yield f"{prefix}:trade:{body['t']}", time_us, "trade", values
        elif kind == "bookTicker":
            values = tuple(float(body[name]) for name in ("b", "B", "a", "A"))
            yield f"{prefix}:quote:{body['u']}", time_us, "quote", values
        elif waiting is not None:
            waiting.append(body)
        elif body["u"] > last_id:
            apply(body)
            top_bids = sorted(bids.items(), reverse=True)[:10]
            top_asks = sorted(asks.items())[:10]
            yield f"{prefix}:book:{body['u']}", time_us, "book", (top_bids, top_asks)


def windows(path: Path, num_events: int) -> dict[str, NDArray[np.float32]]:
    """Event id to its full window, float32 (50, 60), for the first events of a capture."""
    found: dict[str, NDArray[np.float32]] = {}
    rows: deque[NDArray[np.float64]] = deque(maxlen=NUM_STEPS)
    tape = _Tape()
    for number, (event_id, time_us, kind, values) in enumerate(capture_events(path)):
        if number == num_events:
            break
        rows.append(tape.row(time_us, kind, values))
        if len(rows) == NUM_STEPS:
            found[event_id] = np.stack(rows, axis=1).astype(np.float32)
    return found


class _Tape:
    def __init__(self) -> None:
        self.levels: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        self.quote: tuple[float, float, float, float] | None = None
        self.quote_is_newer = False
        self.trade_price = self.signed_size = self.trade_return = 0.0
        self.mid = 0.0
        self.recent: deque[tuple[int, bool]] = deque(maxlen=20)

    def row(self, time_us: int, kind: str, values: Any) -> NDArray[np.float64]:
        if kind == "book":
            self.levels, self.quote_is_newer = values, False
        elif kind == "quote":
            self.quote, self.quote_is_newer = values, True
        else:
            price, size, sign = values
            before = self.trade_price
            self.trade_return = math.log(price / before) if before else 0.0
            self.trade_price, self.signed_size = price, sign * math.log(1 + size)
        bids, asks = ([*side, *[(0.0, 0.0)] * (10 - len(side))] for side in self.levels)
        if self.quote_is_newer and self.quote:
            bids[0], asks[0] = self.quote[:2], self.quote[2:]
        (bid, bid_size), (ask, ask_size) = bids[0], asks[0]
        mid = (bid + ask) / 2 if bid and ask else (bid + ask) or self.trade_price

        def bps(price: float) -> float:
            return (price - mid) / mid * 1e4 if price and mid else 0.0

        def imbalance(depth: int) -> float:
            bought = sum(size for _, size in bids[:depth])
            sold = sum(size for _, size in asks[:depth])
            return (bought - sold) / (bought + sold) if bought + sold else 0.0

        elapsed_us = time_us - self.recent[-1][0] if self.recent else 0
        first = not self.recent
        self.recent.append((time_us, kind == "trade"))
        span_s = max(time_us - self.recent[0][0], 1000) / 1e6
        sizes = bid_size + ask_size
        row = [
            *(bps(price) for price, _ in bids),
            *(math.log(1 + size) for _, size in bids),
            *(bps(price) for price, _ in asks),
            *(math.log(1 + size) for _, size in asks),
            math.log(mid / self.mid) * 1e4 if mid and self.mid else 0.0,
            bps(ask) - bps(bid) if bid and ask else 0.0,
            bps((ask * bid_size + bid * ask_size) / sizes) if bid and ask and sizes else 0.0,
            *(imbalance(depth) for depth in (1, 5, 10)),
            self.signed_size,
            self.trade_return * 1e4,
            0.0 if first else math.log(1 + max(elapsed_us, 0)),
            math.log(1 + sum(is_trade for _, is_trade in self.recent) / span_s),
        ]
        self.mid = mid
        return np.array(row)
