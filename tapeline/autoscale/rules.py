"""How many workers and model replicas: pure functions of load, capacity and costs.

They think in work per second. A lane needs what arrives, and its lag within its drain target; so
much divided by what one can do is the number. Changes are weighed by what they cost, not by timers:

- Up at once when those at work cannot do it, though they are planned with less than they can do.
  Lag that they clear before help can arrive starts nobody.
- Down when those too many have cost as much as taking them away and starting them again would: each
  change of workers stops all of them for a rebalance. That is the rule of ski rental: never worse
  than twice the best in hindsight.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

_FULL = 0.95  # of what those at work can do: beyond it they fall behind


@dataclass(frozen=True, slots=True)
class LaneLoad:
    """What a lane asks for.

    Attributes:
        rate: records appended a second.
        lag: records between what is committed and the end.
        drain_target_s: in how many seconds the lag is to be gone.
        num_busy: partitions with lag or arrivals: more workers than that have nothing to do.
    """

    name: str
    rate: float
    lag: int
    drain_target_s: float
    num_busy: int

    @property
    def work(self) -> float:
        """Records a second that have to be done."""
        return self.rate + self.lag / self.drain_target_s


@dataclass(frozen=True, slots=True)
class Bounds:
    """What limits a number, and what a change of it costs.

    Attributes:
        utilisation: of the capacity, what is planned with.
        start_s: from a decision until the new one works.
        stop_s: how long a change stops all of them.
        idle_s: without any work for so long before the last one goes.
    """

    least: int
    most: int
    utilisation: float
    start_s: float
    stop_s: float
    idle_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """What a decision remembers of the ones before.

    Attributes:
        now_s: when the last one was.
        waste_s: replica-seconds of those too many since there are any.
        enough: the most that was needed meanwhile.
        idle_s: how long nothing came or waited.
    """

    now_s: float | None = None
    waste_s: float = 0.0
    enough: int = 0
    idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """A number, and why.

    Attributes:
        needed: what the load asks for by itself, within the bounds.
        work: records a second that have to be done, as far as those at work leave any over.
        capacity: of one, records a second.
        lag_s: how long those at work would take for the lag, beside what arrives; inf: for ever.
    """

    target: int
    needed: int
    current: int
    work: float
    capacity: float
    lag_s: float
    why: str


def desired_workers(
    lanes: Sequence[LaneLoad], capacity: float, current: int, bounds: Bounds, memory: Memory,
    now_s: float,
) -> tuple[Decision, Memory]:  # fmt: skip
    """As many as the lanes' events need, and no more than a lane has busy partitions.

    Args:
        capacity: events a second of one worker.
        current: those that were asked for last.
        now_s: on a clock that only goes forward.
    """
    useful = max((lane.num_busy for lane in lanes), default=0)
    return _decide(lanes, capacity, current, max(useful, 1), bounds, memory, now_s)


def desired_replicas(
    lanes: Sequence[LaneLoad], capacity: float, current: int, bounds: Bounds, memory: Memory,
    now_s: float,
) -> tuple[Decision, Memory]:  # fmt: skip
    """As many as the lanes' windows need: one an event.

    Args:
        capacity: windows a second of one replica.
    """
    return _decide(lanes, capacity, current, bounds.most, bounds, memory, now_s)


def _decide(
    lanes: Sequence[LaneLoad],
    capacity: float,
    current: int,
    useful: int,
    bounds: Bounds,
    memory: Memory,
    now_s: float,
) -> tuple[Decision, Memory]:
    assert capacity > 0
    planned = capacity * bounds.utilisation
    rate, lag = sum(lane.rate for lane in lanes), sum(lane.lag for lane in lanes)
    spare = current * capacity - rate
    lag_s = 0.0 if not lag else lag / spare if spare > 0 else math.inf
    work = _work(lanes, capacity, current, bounds.start_s)
    wanted = math.ceil(work / planned - 1e-9)
    while wanted < current and _work(lanes, capacity, wanted, bounds.start_s) > planned * wanted:
        wanted += 1  # fewer would not work off the lag that all do
    most = min(bounds.most, useful)
    passed_s = 0.0 if memory.now_s is None else max(0.0, now_s - memory.now_s)
    is_idle = not rate and not lag
    idle_s = memory.idle_s + passed_s if is_idle else 0.0
    least = max(bounds.least, 0 if is_idle and idle_s >= bounds.idle_s else 1)
    if is_idle and current == 0:
        least = bounds.least
    needed = max(least, min(wanted, most))

    def decide(target: int, why: str) -> Decision:
        return Decision(target, needed, current, work, capacity, lag_s, why)

    memory = replace(memory, now_s=now_s, idle_s=idle_s)
    if needed > current and (current < least or work > _FULL * current * capacity):
        capped = f", capped at {most}" if wanted > most else ""
        why = f"{work:.0f}/s to do, {current} x {planned:.0f}/s planned{capped}"
        return decide(needed, f"up: {why}"), replace(memory, waste_s=0.0, enough=0)
    if needed >= current:
        why = "capped" if wanted > most else "idle" if is_idle else "as needed"
        return decide(current, why), replace(memory, waste_s=0.0, enough=0)
    if needed == 0:  # the idle time was the price
        return decide(0, f"down: nothing came for {idle_s:.0f} s"), Memory(now_s)
    waste_s = memory.waste_s + (current - needed) * passed_s
    enough = max(memory.enough, needed)
    price_s = bounds.start_s * (current - enough) + 2 * bounds.stop_s * current
    if enough < current and waste_s >= price_s:
        why = f"down: {current - enough} too many have cost {waste_s:.0f} replica-seconds"
        return decide(enough, why), replace(memory, waste_s=0.0, enough=0)
    if enough >= current:  # it was needed meanwhile: the time before it counts for nothing
        waste_s, enough = 0.0, needed
    why = f"{current - needed} too many, {waste_s:.0f} of {price_s:.0f} replica-seconds"
    return decide(current, why), replace(memory, waste_s=waste_s, enough=enough)


def _work(lanes: Sequence[LaneLoad], capacity: float, number: int, start_s: float) -> float:
    """Records a second that so many would have to do, without the lag that they clear before help
    can arrive: the most urgent lane's first.
    """
    cleared = max(0.0, number * capacity - sum(lane.rate for lane in lanes)) * start_s
    work = 0.0
    for lane in sorted(lanes, key=lambda lane: lane.drain_target_s):
        left = max(0.0, lane.lag - cleared)
        cleared = max(0.0, cleared - lane.lag)
        work += lane.rate + left / lane.drain_target_s
    return work


def as_table(lanes: Sequence[LaneLoad]) -> list[Mapping[str, object]]:
    """The lanes as rows, for people."""
    return [
        {
            "lane": lane.name,
            "rate": round(lane.rate, 1),
            "lag": lane.lag,
            "drain_target_s": lane.drain_target_s,
            "work": round(lane.work, 1),
            "num_busy": lane.num_busy,
        }
        for lane in lanes
    ]
