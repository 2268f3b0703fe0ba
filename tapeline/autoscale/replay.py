"""Traces of load played in virtual time against our rules and what else there is.

The world: records arrive by lane and wait in one line; those at work take so many a second each;
a new one works after its start-up time; every change stops all of them for a rebalance. Ages are
those of the oldest record that waits.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from schemas.autoscale import AutoscaleSettings
from schemas.errors import ConfigError
from tapeline.autoscale.rules import Bounds, LaneLoad, Memory, desired_workers
from tapeline.autoscale.trace import Entry

_RATE_WEIGHT = 0.2  # of the newest second
_MAX_STEPS = 1_000_000


@dataclass(frozen=True, slots=True)
class Load:
    """Arrivals by second, (T,) for each lane, and what waits already when it begins."""

    name: str
    arrivals: Mapping[str, NDArray[np.float64]]

    @property
    def num_seconds(self) -> int:
        return len(next(iter(self.arrivals.values())))


class Scaler(Protocol):
    """Says how many there are to be, once a second."""

    name: str

    def target(self, now_s: float, lanes: Sequence[LaneLoad], current: int, busy: float) -> int:
        """``busy``: calls in flight, in units of those that one works on at a time."""


class Ours:
    """The rules of ``tapeline.autoscale.rules``, at their period."""

    name = "Tapeline"

    def __init__(self, settings: AutoscaleSettings, capacity: float) -> None:
        self._settings, self._capacity = settings, capacity
        self._bounds = Bounds(
            settings.min_workers, settings.max_workers, settings.utilisation,
            settings.worker_start_s, settings.rebalance_s, settings.idle_s,
        )  # fmt: skip
        self._memory = Memory()
        self._next_s = 0.0

    def target(self, now_s: float, lanes: Sequence[LaneLoad], current: int, busy: float) -> int:
        if now_s < self._next_s:
            return current
        self._next_s = now_s + self._settings.period_s
        decision, self._memory = desired_workers(
            lanes, self._capacity, current, self._bounds, self._memory, now_s
        )
        return decision.target


class LagThreshold:
    """KEDA's Kafka scaler with its defaults: so much lag for each replica, asked every 30 s; then
    Kubernetes: up at once, down to the most that was wanted in the last 300 s.

    Args:
        threshold: lag a replica; here what one works off within the drain target.
    """

    name = "lag threshold (KEDA)"
    _POLL_S, _STABLE_S = 30.0, 300.0

    def __init__(self, settings: AutoscaleSettings, capacity: float) -> None:
        self._least, self._most = settings.min_workers, settings.max_workers
        self._threshold = capacity * settings.drain_target_s
        self._wanted: deque[tuple[float, int]] = deque()
        self._next_s = 0.0

    def target(self, now_s: float, lanes: Sequence[LaneLoad], current: int, busy: float) -> int:
        if now_s < self._next_s:
            return current
        self._next_s = now_s + self._POLL_S
        lag = sum(lane.lag for lane in lanes)
        useful = max((lane.num_busy for lane in lanes), default=1)
        wanted = min(math.ceil(lag / self._threshold), max(useful, 1))
        wanted = min(max(wanted, self._least), self._most)
        self._wanted.append((now_s, wanted))
        while self._wanted[0][0] < now_s - self._STABLE_S:
            self._wanted.popleft()
        return max(one for _, one in self._wanted) if wanted < current else wanted


class OngoingRequests:
    """Ray Serve's own policy: requests in flight for each replica, the mean of 30 s; up after 30 s,
    down after 600 s, as by default. A worker keeps two calls in flight, whatever waits in Kafka, so
    the default target of 2 would never see a backlog: it is 1 here.
    """

    name = "ongoing requests (Ray Serve)"
    _TARGET, _LOOK_BACK_S, _UP_S, _DOWN_S = 1.0, 30, 30.0, 600.0

    def __init__(self, settings: AutoscaleSettings, capacity: float) -> None:
        self._least, self._most = settings.min_workers, settings.max_workers
        self._busy: deque[float] = deque(maxlen=self._LOOK_BACK_S)
        self._since_s: float | None = None
        self._up = True

    def target(self, now_s: float, lanes: Sequence[LaneLoad], current: int, busy: float) -> int:
        self._busy.append(busy)
        mean = sum(self._busy) / len(self._busy)
        wanted = min(max(math.ceil(mean / self._TARGET), self._least), self._most)
        if wanted == current:
            self._since_s = None
            return current
        if self._since_s is None or self._up != (wanted > current):
            self._since_s, self._up = now_s, wanted > current
        delay_s = self._UP_S if self._up else self._DOWN_S
        if now_s - self._since_s < delay_s:
            return current
        self._since_s = None
        return wanted


SCALERS: Sequence[Callable[[AutoscaleSettings, float], Scaler]] = (
    Ours, LagThreshold, OngoingRequests,
)  # fmt: skip


@dataclass(slots=True)
class Played:
    """What became of a load under a scaler.

    Attributes:
        replica_s: replica-seconds spent, starting ones included.
        late_s: seconds in which the oldest record was older than the target.
        turns: changes of direction.
        history: by second: arrivals, lag, how many.
    """

    scaler: str
    load: str
    replica_s: float = 0.0
    late_s: float = 0.0
    oldest_s: float = 0.0
    num_changes: int = 0
    turns: int = 0
    history: list[tuple[float, float, int]] = field(default_factory=list)


def play(
    load: Load,
    scaler: Scaler,
    settings: AutoscaleSettings,
    *,
    capacity: float,
    num_partitions: int,
    drain_s: Mapping[str, float] | None = None,
) -> Played:
    """Runs a load in virtual time, a second a step.

    Args:
        capacity: records a second of one.
        num_partitions: of each lane; more than that have nothing to do.
        drain_s: a lane's drain target; else the settings'.
    """
    drain_s = drain_s or {}
    played = Played(scaler.name, load.name)
    waiting = dict.fromkeys(load.arrivals, 0.0)
    line: deque[tuple[int, float]] = deque()  # second of arrival, records that still wait
    ready_s = [0.0] * max(settings.min_workers, 1)  # when each of them works
    rates = dict.fromkeys(load.arrivals, 0.0)
    stopped_until_s, direction = 0.0, 0
    for now in range(load.num_seconds):
        arrived = {lane: float(series[now]) for lane, series in load.arrivals.items()}
        for lane, records in arrived.items():
            waiting[lane] += records
        line.append((now, sum(arrived.values())))
        working = sum(1 for one in ready_s if one <= now and now >= stopped_until_s)
        done = _take(line, min(working, num_partitions) * capacity)
        for lane in sorted(waiting, key=lambda one: drain_s.get(one, settings.drain_target_s)):
            taken = min(waiting[lane], done)
            waiting[lane] -= taken
            done -= taken
        lag = sum(waiting.values())
        age_s = now - line[0][0] if line and lag >= 1 else 0
        played.late_s += age_s > settings.drain_target_s
        played.oldest_s = max(played.oldest_s, age_s)
        played.replica_s += len(ready_s)
        played.history.append((sum(arrived.values()), lag, len(ready_s)))
        rates = {
            lane: rates[lane] + _RATE_WEIGHT * (records - rates[lane])
            for lane, records in arrived.items()
        }
        lanes = [
            LaneLoad(
                lane, rates[lane], int(waiting[lane]),
                drain_s.get(lane, settings.drain_target_s),
                num_partitions if arrived[lane] or waiting[lane] >= 1 else 0,
            )
            for lane in arrived
        ]  # fmt: skip
        most = 2.0 * len(ready_s)  # calls that the workers keep in flight
        busy = most if lag > capacity else min(most, sum(arrived.values()) / capacity)
        target = scaler.target(float(now), lanes, len(ready_s), busy)
        if target != len(ready_s):
            played.num_changes += 1
            turned = 1 if target > len(ready_s) else -1
            played.turns += direction != 0 and turned != direction
            direction = turned
            stopped_until_s = now + settings.rebalance_s
            ready_s.sort()
            ready_s = ready_s[:target]
            ready_s += [now + settings.worker_start_s] * (target - len(ready_s))
    return played


def _take(line: deque[tuple[int, float]], most: float) -> float:
    left = most
    while line and left > 0:
        second, records = line[0]
        taken = min(records, left)
        left -= taken
        if taken < records:
            line[0] = (second, records - taken)
        else:
            line.popleft()
    return most - left


# Loads.


def recorded(name: str, entries: Iterator[Entry]) -> Load:
    """The arrivals of a recorded trace: each look's rates, until the next one.

    Raises ConfigError if it holds fewer than two looks.
    """
    looks = [(one.at_s, one.lanes) for one in entries if one.role == "workers" and one.lanes]
    if len(looks) < 2:
        raise ConfigError(f"{name} holds fewer than two looks at the lanes; record for longer")
    begin_s = looks[0][0]
    num_seconds = int(looks[-1][0] - begin_s) + 1
    if num_seconds > _MAX_STEPS:
        raise ConfigError(f"{name} covers {num_seconds} s, more than {_MAX_STEPS}; cut it")
    names = [lane.name for lane in looks[0][1]]
    arrivals = {lane: np.zeros(num_seconds) for lane in names}
    for (at_s, lanes), (next_s, _) in zip(looks, [*looks[1:], looks[-1]], strict=True):
        begin, end = int(at_s - begin_s), int(next_s - begin_s)
        for lane in lanes:
            arrivals[lane.name][begin:end] = lane.rate
    for lane in looks[0][1]:
        arrivals[lane.name][0] += lane.lag
    return Load(name, arrivals)


def made_up(capacity: float, most: int) -> list[Load]:
    """Four loads of three hours, seeded, up to what ``most`` of that capacity can do."""
    rng = np.random.default_rng(0)
    seconds = np.arange(3 * 3600)
    full = 0.8 * capacity * most
    noise = rng.lognormal(0, 0.2, len(seconds))
    day = full * (0.5 - 0.45 * np.cos(2 * np.pi * seconds / len(seconds))) * noise
    calm = np.full(len(seconds), 0.1 * full) * noise
    crash = calm + np.where(seconds >= 3600, full * np.exp(-(seconds - 3600) / 300), 0)
    saw = full * (seconds % 1800) / 1800 * noise
    backfill = np.where(seconds == 1800, full * 900, 0.0)
    nothing = np.zeros(len(seconds))
    return [
        Load("diurnal", {"realtime": day, "historical": nothing}),
        Load("flash crash", {"realtime": crash, "historical": nothing}),
        Load("sawtooth", {"realtime": saw, "historical": nothing}),
        Load("backfill", {"realtime": calm, "historical": backfill}),
    ]


def plot(runs: Sequence[Played], path: Path) -> None:
    """Arrivals, and for each scaler lag and number, by time.

    Raises ConfigError without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("a plot needs matplotlib; `pip install matplotlib`") from error
    loads = list(dict.fromkeys(one.load for one in runs))
    figure = Figure(figsize=(5 * len(loads), 8), layout="constrained")
    axes = figure.subplots(3, len(loads), squeeze=False, sharex="col")
    for column, load in enumerate(loads):
        for one in runs:
            if one.load != load:
                continue
            arrivals, lag, number = np.array(one.history).T
            minutes = np.arange(len(arrivals)) / 60
            axes[1][column].plot(minutes, lag, label=one.scaler, linewidth=1)
            axes[2][column].step(minutes, number, label=one.scaler, linewidth=1)
        axes[0][column].plot(minutes, arrivals, color="black", linewidth=0.5)
        axes[0][column].set_title(load)
        axes[1][column].set_yscale("symlog", linthresh=1000)
        axes[2][column].set_xlabel("minutes")
    for row, label in enumerate(("arrivals/s", "lag, records", "replicas")):
        axes[row][0].set_ylabel(label)
    axes[2][0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
