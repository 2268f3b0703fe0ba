"""A worker at a steady rate for a long time: does anything grow?

    python -m benchmarks.soak [--minutes 30] [--rate 200] [--delivery exactly_once] [--json]

Starts a broker and a Redis of its own and one ``tapeline worker`` with the default CPU model. Looks
at it every few seconds: memory, file descriptors, threads, tasks of its event loop, lag. The first
share of the looks is left out: tables and allocators fill up. The local table of event ids is made
small, or it would grow for all of the run: 200,000 ids by default, about 200 bytes each.

Flat is judged from a line by least squares: its slope, and the slope's standard error, widened for
samples that resemble their predecessors. Latency is of each minute, from append to append. Exit
code 1 if something grows.
"""

import argparse
import json
import math
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import psutil

from benchmarks.tape import Passage, Reader, Tape, parts, processor
from schemas.settings import Settings
from tapeline.lag import lane_lags
from tapeline.machine import this_machine
from tapeline.processes import free_ports
from tapeline.producer import MarketEventProducer
from tapeline.subscriber import FeatureSubscriber

_MB = 1024 * 1024
_IDLE_S = 60.0
_TOLERATED_SHARE = 0.01  # of the mean, an hour: a slope below it is nothing to act on
_NUM_ERRORS = 2.0  # standard errors that a slope may be from 0 by chance


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the worker; None where it does not say. ``at_s`` counts from the first look."""

    at_s: float
    rss_mb: float
    fds: float
    threads: float
    tasks: float | None
    lag: float


@dataclass(frozen=True, slots=True)
class Trend:
    """One figure over the run: the line through its samples after the warm-up.

    Attributes:
        slope_per_hour, error_per_hour: the slope and its standard error.
    """

    name: str
    unit: str
    first: float
    last: float
    mean: float
    slope_per_hour: float
    error_per_hour: float

    @property
    def grows(self) -> bool:
        """The slope is above 0 by more than chance, and by enough to matter."""
        beyond_chance = self.slope_per_hour > _NUM_ERRORS * self.error_per_hour
        return beyond_chance and self.slope_per_hour > _TOLERATED_SHARE * max(self.mean, 1.0)

    def verdict(self) -> str:
        """The judgement, in words."""
        unit = f" {self.unit}" if self.unit else ""
        slope = f"{self.slope_per_hour:+.2f} ± {self.error_per_hour:.2f}{unit}/hour"
        line = f"{self.name}: {self.first:.1f} to {self.last:.1f}{unit}, {slope}: "
        if self.grows:
            return line + f"grows; a day at this pace adds {24 * self.slope_per_hour:.1f}{unit}"
        if self.slope_per_hour > _NUM_ERRORS * self.error_per_hour:
            return line + f"flat; it rises by less than {_TOLERATED_SHARE:.0%} of its mean an hour"
        if self.slope_per_hour < -_NUM_ERRORS * self.error_per_hour:
            return line + "falls"
        return line + f"flat; within {_NUM_ERRORS:g} standard errors of 0"


@dataclass(frozen=True, slots=True)
class Minute:
    """Latency of the features of one minute, from append to append."""

    number: int
    num_features: int
    p50_ms: float
    p99_ms: float


def main() -> None:
    """Runs what the command line asks for; exits with 1 if something grows."""
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--rate", type=float, default=200, help="events per second")
    parser.add_argument(
        "--delivery", choices=("at_least_once", "exactly_once"), default="at_least_once"
    )
    parser.add_argument("--every", type=float, default=5, help="seconds between two looks")
    parser.add_argument("--warm-up", type=float, default=0.3, help="share that is left out")
    parser.add_argument("--max-local-ids", type=int, default=20_000, help="redis.max_local_ids")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    machine = str(this_machine())
    overrides = {
        "worker": {"delivery": options.delivery},
        "redis": {"max_local_ids": options.max_local_ids},
        "metrics": {"port": free_ports(1)[0]},
    }
    with parts(**overrides) as settings, processor(settings) as process:
        tape = Tape(settings)
        tape.warm_up()
        soak = Soak(settings, process, options.every)
        soak.run(tape, int(options.minutes * 60 * options.rate), options.rate)
    trends = _trends(soak.samples, options.warm_up)
    if options.json:
        print(json.dumps(_report(machine, options, soak, trends), indent=2))
    else:
        print(f"{options.delivery}, {options.rate:g} events/s, {options.minutes:g} min; {machine}")
        print(
            f"redis.max_local_ids {options.max_local_ids:,}; "
            f"lines through what follows the first {options.warm_up:.0%} of the run\n"
        )
        print("\n".join(trend.verdict() for trend in trends))
        print(f"\n{_table(soak.minutes)}")
    if any(trend.grows for trend in trends):
        raise SystemExit(1)


class Soak:
    """One run: events at a rate from this thread, looks from a second, features from a third.

    Attributes:
        samples, minutes: what has been seen so far.
    """

    def __init__(self, settings: Settings, process: psutil.Process, every_s: float) -> None:
        self.samples: list[Sample] = []
        self.minutes: list[Minute] = []
        self._settings = settings
        self._process = process
        self._every_s = every_s
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def run(self, tape: Tape, num_events: int, rate_hz: float) -> None:
        """Blocks until every event has its feature. Raises SystemExit if some never come."""
        subscriber = FeatureSubscriber(
            self._settings, limit=num_events, idle_timeout_s=_IDLE_S, lanes=["realtime"]
        )
        with subscriber, MarketEventProducer(self._settings) as producer:
            reader = Reader(subscriber)
            looking = threading.Thread(target=self._look_regularly, args=[reader], name="look")
            looking.start()
            try:
                for event in tape.due(num_events, rate_hz):
                    producer.produce(event)
                    if self._error:
                        break
                producer.flush()
            finally:
                self._ended.set()
                looking.join()
            if self._error:
                raise self._error
            self._note_minute(reader.join())
        num_features = sum(minute.num_features for minute in self.minutes)
        if num_features < num_events:
            raise SystemExit(f"{num_features} features of {num_events} came")

    def _look_regularly(self, reader: Reader) -> None:
        begin_s = time.monotonic()
        try:
            while not self._ended.wait(self._every_s):
                elapsed_s = time.monotonic() - begin_s
                self.samples.append(self._look(elapsed_s))
                if elapsed_s >= 60 * (len(self.minutes) + 1):
                    self._note_minute(reader.take())
        except BaseException as error:
            self._error = error

    def _look(self, elapsed_s: float) -> Sample:
        lanes = [self._settings.lane("realtime")]
        return Sample(
            at_s=elapsed_s,
            rss_mb=self._process.memory_info().rss / _MB,
            fds=self._process.num_fds(),
            threads=self._process.num_threads(),
            tasks=_metric(self._settings.metrics.port, "tapeline_tasks"),
            lag=sum(one.lag for one in lane_lags(self._settings, lanes)),
        )

    def _note_minute(self, passages: Sequence[Passage]) -> None:
        if not passages:
            return
        latencies_ms = [(one.feature_us - one.event_us) / 1000 for one in passages]
        p50, p99 = np.percentile(latencies_ms, [50, 99]).tolist()
        self.minutes.append(Minute(len(self.minutes) + 1, len(passages), p50, p99))


def _metric(port: int, name: str) -> float | None:
    """A metric without labels from the worker's Prometheus page; None if it has no such."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as page:
        for line in page.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
    return None


def _trends(samples: Sequence[Sample], warm_up_share: float) -> list[Trend]:
    """Of every figure that all looks have."""
    begin = int(len(samples) * warm_up_share)
    times_h = np.array([sample.at_s for sample in samples]) / 3600
    trends = []
    for name, unit in {
        "rss_mb": "MB",
        "fds": "",
        "threads": "",
        "tasks": "",
        "lag": "records",
    }.items():
        values = [getattr(sample, name) for sample in samples]
        if None in values:
            continue
        slope, error = slope_and_error(times_h[begin:], np.array(values[begin:]))
        mean = float(np.mean(values[begin:]))
        trends.append(Trend(name, unit, values[0], values[-1], mean, slope, error))
    return trends


def slope_and_error(
    times: np.ndarray[tuple[int], np.dtype[np.float64]],
    values: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> tuple[float, float]:
    """The least-squares slope of some samples at even distances, and its standard error.

    Memory moves in steps, so samples resemble their predecessors and say less than their number
    suggests: the error is widened by sqrt((1 + r) / (1 - r)), r the residuals' correlation with
    their predecessors.
    """
    if len(times) < 4:
        raise SystemExit(f"{len(times)} samples after the warm-up make no line; run for longer")
    if not np.ptp(values):
        return 0.0, 0.0
    centred = times - times.mean()
    spread = float(centred @ centred)
    slope = float(centred @ values) / spread
    residuals = values - values.mean() - slope * centred
    squares = float(residuals @ residuals)
    if not squares:
        return slope, 0.0
    error = math.sqrt(squares / (len(times) - 2) / spread)
    correlation = min(max(float(residuals[1:] @ residuals[:-1]) / squares, 0.0), 0.99)
    return slope, error * math.sqrt((1 + correlation) / (1 - correlation))


def _report(
    machine: str, options: argparse.Namespace, soak: Soak, trends: Sequence[Trend]
) -> dict[str, object]:
    return {
        "machine": machine,
        "delivery": options.delivery,
        "rate_hz": options.rate,
        "minutes": options.minutes,
        "max_local_ids": options.max_local_ids,
        "warm_up_share": options.warm_up,
        "trends": [asdict(one) | {"verdict": one.verdict()} for one in trends],
        "latency": [asdict(one) for one in soak.minutes],
        "samples": [asdict(one) for one in soak.samples],
    }


def _table(minutes: Sequence[Minute]) -> str:
    lines = ["| minute | features | p50 ms | p99 ms |", "| ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {one.number} | {one.num_features} | {one.p50_ms:.0f} | {one.p99_ms:.0f} |"
        for one in minutes
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
