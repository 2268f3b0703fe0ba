"""Requests at times that do not depend on the answers, or one after the other.

A closed loop waits for each answer, so a system that stalls is asked less while it does, and its
percentiles hide the stall (coordinated omission). The open loop sends what is due when it is due,
and counts each latency from then, however late the sending itself was.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from schemas.errors import TapelineError


class Target(Protocol):
    """What is asked. Requests overlap."""

    async def request(self, number: int) -> None:
        """Returns when it is answered. Raises TapelineError if it failed."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request; seconds since the beginning.

    Attributes:
        due_s: when it was to be sent.
        sent_s: when it was.
        ended_s: when it was answered, or had failed.
        error: why it failed; None: it was answered.
    """

    due_s: float
    sent_s: float
    ended_s: float
    error: str | None = None

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.due_s


Progress = Callable[[float], None]  # told how many seconds have passed


def arrivals(rate_hz: float, seconds: float, seed: int) -> Iterator[float]:
    """Times of a Poisson process, in seconds: independent customers, so bursts are part of it."""
    random = np.random.default_rng(seed)
    at_s = 0.0
    while True:
        for gap_s in random.exponential(1 / rate_hz, 1_024):
            at_s += float(gap_s)
            if at_s >= seconds:
                return
            yield at_s


async def open_loop(
    target: Target, due: Iterator[float], timeout_s: float, progress: Progress
) -> list[Outcome]:
    """Sends each request when it is due, and waits for the last answers.

    Args:
        timeout_s: after it is due, a request without an answer has failed.
    """
    begin_s = time.perf_counter()
    asking: list[asyncio.Task[Outcome]] = []
    for number, due_s in enumerate(due):
        if (ahead_s := begin_s + due_s - time.perf_counter()) > 0:
            await asyncio.sleep(ahead_s)
        elif number % 64 == 0:
            await asyncio.sleep(0)  # late: answers must be taken all the same
        progress(due_s)
        asking.append(asyncio.create_task(_ask(target, number, begin_s, due_s, timeout_s)))
    return await asyncio.gather(*asking)


async def closed_loop(
    target: Target, seconds: float, timeout_s: float, progress: Progress
) -> list[Outcome]:
    """One request after the other: what an answer takes when nothing else is asked."""
    begin_s = time.perf_counter()
    outcomes: list[Outcome] = []
    while (now_s := time.perf_counter() - begin_s) < seconds:
        progress(now_s)
        outcomes.append(await _ask(target, len(outcomes), begin_s, now_s, timeout_s))
    return outcomes


async def _ask(
    target: Target, number: int, begin_s: float, due_s: float, timeout_s: float
) -> Outcome:
    sent_s = time.perf_counter() - begin_s
    error = None
    try:
        async with asyncio.timeout(max(0.0, due_s + timeout_s - sent_s)):
            await target.request(number)
    except TimeoutError:
        error = f"no answer within {timeout_s:g} s"
    except TapelineError as failure:
        error = str(failure)
    return Outcome(due_s, sent_s, time.perf_counter() - begin_s, error)


def is_overwhelmed(outcomes: Sequence[Outcome], seconds: float, max_errors: float) -> str | None:
    """Why a rate was too much for so many seconds; None: it was not.

    Either too many requests failed, or the last third waited more than twice as long as the first
    (and by a tenth of a second more): a queue grew, and would have gone on growing.
    """
    failed = sum(one.error is not None for one in outcomes) / max(1, len(outcomes))
    if failed > max_errors:
        return f"{failed:.0%} of the requests failed"
    first = [one.latency_s for one in outcomes if one.due_s < seconds / 3]
    last = [one.latency_s for one in outcomes if one.due_s >= seconds * 2 / 3]
    if not first or not last:
        return None
    early_s, late_s = float(np.median(first)), float(np.median(last))
    if late_s > 2 * early_s and late_s > early_s + 0.1:
        return f"answers took {1000 * early_s:.0f} ms at first, {1000 * late_s:.0f} ms at last"
    return None
