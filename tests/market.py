"""Tapes made up for training: a market whose book says where the price goes, or says nothing."""

import numpy as np

from inference.training.tape import Tape
from schemas.messages import Book, MarketEvent, Trade

STEP_US = 100_000
IMBALANCE = 43


def planted_tape(
    num_rows: int = 1_500,
    *,
    seed: int = 0,
    channel: int = IMBALANCE,
    signal: float = 1.0,
    num_steps: int = 8,
    num_channels: int = 50,
    num_runs: int = 1,
) -> Tape:
    """Mids go where one channel points, ``signal`` of the time; the other channels are noise."""
    chance = np.random.default_rng(seed)
    rows = chance.standard_normal((num_rows, num_channels)).astype(np.float32)
    # The pull stays for ten rows, so that what comes next mostly follows it.
    pull = np.repeat(chance.choice([-1.0, 0.0, 1.0], num_rows), 10)[:num_rows]
    rows[:, channel] = pull + 0.1 * chance.standard_normal(num_rows)
    follows = chance.random(num_rows) < signal
    steps = np.where(follows, pull, chance.choice([-1.0, 0.0, 1.0], num_rows))
    steps += 0.05 * chance.standard_normal(num_rows)
    mids = 1_000 + np.concatenate([[0], np.cumsum(steps)[:-1]])  # a row comes before its move
    return Tape(
        rows=rows,
        times_us=np.arange(num_rows) * STEP_US,
        mids=mids,
        runs=np.sort(np.arange(num_rows) % num_runs),
        symbols=tuple(f"venue:S{number}" for number in range(num_runs)),
        num_steps=num_steps,
    )


def book_events(num: int, *, seed: int = 0, symbols: int = 2) -> list[MarketEvent]:
    """Books and trades in turn, of a price that walks."""
    chance = np.random.default_rng(seed)
    mids = 100 + np.cumsum(chance.normal(0, 0.05, num))
    sizes = chance.uniform(1, 9, (num, 2))
    events = []
    for number in range(num):
        mid, (bid, ask) = round(float(mids[number]), 2), sizes[number].tolist()
        payload = (
            Trade(mid, bid, "buy" if ask > 5 else "sell")
            if number % 3 == 2
            else Book.from_levels(
                [(mid - 0.01 * level, bid) for level in range(1, 11)],
                [(mid + 0.01 * level, ask) for level in range(1, 11)],
            )
        )
        events.append(
            MarketEvent(
                event_id=f"event-{seed}-{number}",
                symbol=f"S{number % symbols}",
                venue="venue",
                event_time_us=10**15 + number * STEP_US,
                payload=payload,
            )
        )
    return events
