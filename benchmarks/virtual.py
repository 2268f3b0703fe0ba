"""The lane scheduler under a load, in virtual time: no clock, no broker, no model. Pure.

What is simulated is what stands around the real ``LaneScheduler``: records that arrive, an intake
that prepares one micro-batch after another, a model that works off one call at a time, and the
slots that bound how many are on their way. What a broker, a network and an operating system add is
left out, and so is the pause of a full lane, which changes where records wait and not in what order
they leave. A slot is filled as soon as it is free; the worker waits until the model nearly is
(``consumers/admission.py``), so its latencies are shorter than these. The shares are the same.
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from consumers.records import Record
from consumers.scheduler import LaneScheduler
from consumers.service_times import ServiceTimes, bucket_of
from schemas.lanes import LaneSettings
from schemas.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class Station:
    """What a micro-batch meets behind the scheduler.

    Attributes:
        service_s: seconds that the model takes, by batch bucket; a bucket that is missing takes as
            long as the next larger one, or the largest.
        prepare_s: seconds of the intake for one micro-batch, before the model.
        between_s: seconds that pass between two calls of the model even if one waits.
    """

    service_s: Mapping[int, float]
    prepare_s: float = 0.0
    between_s: float = 0.0
    max_batch: int = WorkerSettings().max_batch
    max_in_flight: int = WorkerSettings().max_in_flight
    max_service_share: float = WorkerSettings().max_service_share

    def seconds(self, num_windows: int) -> float:
        """How long the model takes for so many windows."""
        bucket = bucket_of(num_windows)
        larger = [size for size in self.service_s if size >= bucket]
        return self.service_s[min(larger) if larger else max(self.service_s)]


@dataclass(frozen=True, slots=True)
class Way:
    """One record's way, in seconds of virtual time."""

    lane: str
    arrived_s: float
    taken_s: float
    done_s: float
    num_aboard: int

    @property
    def waited_s(self) -> float:
        return self.taken_s - self.arrived_s

    @property
    def latency_s(self) -> float:
        return self.done_s - self.arrived_s


class _Arrivals:
    """Records that come to the scheduler when they are due; each lane's times ascend."""

    def __init__(self, times_s: Mapping[str, Sequence[float]]) -> None:
        self._coming = {lane: deque(times) for lane, times in times_s.items()}
        assert all(list(times) == sorted(times) for times in self._coming.values())

    def next_s(self) -> float | None:
        return min((times[0] for times in self._coming.values() if times), default=None)

    def put_due(self, scheduler: LaneScheduler, now_s: float) -> None:
        for lane, times in self._coming.items():
            due: list[Record] = []
            while times and times[0] <= now_s:
                appended_us = round(times.popleft() * 1e6)
                due.append(Record(lane, (lane, 0), 0, None, None, (), appended_us))
            scheduler.put(lane, due)


def simulate_lanes(
    lanes: Sequence[LaneSettings],
    arrivals_s: Mapping[str, Sequence[float]],
    station: Station,
    *,
    until_s: float = float("inf"),
) -> list[Way]:
    """The way of every record taken before ``until_s``, in the order in which they were taken.

    The scheduler learns the model's time from the simulated calls, each when it has ended. A slot
    is free again when its call has ended.
    """
    service_times = ServiceTimes()
    service_times.expect(station.service_s)
    scheduler = LaneScheduler(
        lanes,
        service_times,
        max_batch=station.max_batch,
        max_service_share=station.max_service_share,
    )
    arrivals = _Arrivals(arrivals_s)
    slots_free_s = [0.0] * station.max_in_flight
    intake_free_s = model_free_s = 0.0
    calls: deque[tuple[int, float, float]] = deque()  # not yet known to have ended
    ways: list[Way] = []
    while True:
        now_s = max(intake_free_s, slots_free_s[0])
        arrivals.put_due(scheduler, now_s)
        if not len(scheduler):
            if (next_s := arrivals.next_s()) is None:
                return ways
            now_s = max(now_s, next_s)
            arrivals.put_due(scheduler, now_s)
        if now_s >= until_s:
            return ways
        while calls and calls[0][2] <= now_s:
            service_times.observe(*calls.popleft())

        records = scheduler.take(round(now_s * 1e6))
        intake_free_s = now_s + station.prepare_s
        begun_s = max(intake_free_s, model_free_s)
        done_s = begun_s + station.seconds(len(records))
        model_free_s = done_s + station.between_s
        calls.append((len(records), begun_s, done_s))
        heapq.heapreplace(slots_free_s, done_s)
        ways += [
            Way(one.lane, one.appended_us / 1e6, now_s, done_s, len(records)) for one in records
        ]


def steady(rate_hz: float, until_s: float, *, from_s: float = 0.0) -> list[float]:
    """Arrival times at equal distances."""
    num_records = int((until_s - from_s) * rate_hz)
    return [from_s + number / rate_hz for number in range(num_records)]


def shares(ways: Sequence[Way], lanes: Sequence[LaneSettings]) -> dict[str, float]:
    """Of all records taken, how many were each lane's; 0 to 1."""
    counted = {lane.name: 0 for lane in lanes}
    for way in ways:
        counted[way.lane] += 1
    return {name: num / max(len(ways), 1) for name, num in counted.items()}
