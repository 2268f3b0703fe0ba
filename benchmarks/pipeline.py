"""From event appended to feature appended, on a real Kafka and a real Redis.

    python -m benchmarks.pipeline [--mode worker|serve] [--rates 100,250,500] [--rounds 3]

Starts a broker and a Redis of its own and one worker with the default CPU model: as a plain process
(``worker``), or as two deployments on Ray Serve (``serve``). Two questions:

- latency: events of a simulated market arrive at a set rate, whether or not the pipeline keeps up
  (open loop). Both timestamps are the broker's (LogAppendTime, in ms): one clock counts.
- capacity: how fast a backlog is worked off.

Rates are interleaved over the rounds, and the median round is shown. Everything shares the machine:
broker, Redis, worker, model, producer and subscriber.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil

from schemas.messages import MarketEvent
from schemas.settings import Settings, as_environment, load_settings
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.stack import Stack
from tapeline.subscriber import FeatureRecord, FeatureSubscriber
from tapeline.topics import ensure_topics

_NUM_SYMBOLS = 10
_WARM_UP = 59  # events of a symbol that give no feature
_IDLE_S = 60.0


@dataclass(frozen=True, slots=True)
class Latency:
    """One rate in one round. Percentiles from append to append, milliseconds."""

    rate_hz: float
    num_features: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


def main() -> None:
    """Runs what the command line asks for; prints a table, and JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="benchmarks.pipeline", description=__doc__)
    parser.add_argument("--mode", choices=("worker", "serve"), default="worker")
    parser.add_argument("--rates", default="100,250,500", help="events per second")
    parser.add_argument("--seconds", type=float, default=10, help="of each rate in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backlog", type=int, default=10_000, help="events; 0: leave it out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        stack = Stack.on_free_ports(load_settings(state_dir=Path(folder)))
        try:
            stack.up()
            report = _measure(stack.settings, Path(folder) / "worker.log", options)
        finally:
            stack.down(purge=True)
    print(json.dumps(report, indent=2) if options.json else _table(report))


def _measure(settings: Settings, log: Path, options: argparse.Namespace) -> dict[str, object]:
    rates = [float(rate) for rate in options.rates.split(",")]
    ensure_topics(settings)
    tape = _Tape(settings)
    with _processor(settings, options.mode, log):
        tape.warm_up()
        rounds = [
            [tape.play(rate, options.seconds) for rate in rates] for _ in range(options.rounds)
        ]
        capacity = tape.backlog(options.backlog) if options.backlog else None
    return {
        "machine": f"{psutil.cpu_count()} cores, {_cpu_name()}",
        "versions": f"Python {platform.python_version()}",
        "mode": options.mode,
        "latency": [asdict(_median(list(one))) for one in zip(*rounds, strict=True)],
        "capacity_events_per_s": capacity,
    }


@contextmanager
def _processor(settings: Settings, mode: str, log: Path) -> Iterator[None]:
    """``tapeline worker`` or ``tapeline run`` in a process of its own."""
    command = [sys.executable, "-m", "tapeline", "worker" if mode == "worker" else "run"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | as_environment(settings), stdout=output, stderr=output
        )
    try:
        yield
        if process.poll() is not None:
            raise SystemExit(f"the processor ended early:\n{log.read_text()[-2_000:]}")
    finally:
        process.terminate()
        process.wait(120)


class _Tape:
    """The load, and what comes of it. Windows stay full from one measurement to the next."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._symbols = symbol_names(_NUM_SYMBOLS)
        self._seed = 0

    def warm_up(self) -> None:
        """Fills every window, and waits until features flow."""
        num_events = 200 * _NUM_SYMBOLS
        self._play_and_receive(num_events, 2_000.0, num_missing=_WARM_UP * _NUM_SYMBOLS)

    def play(self, rate_hz: float, seconds: float) -> Latency:
        """Events at a rate; the first fifth is not counted."""
        num_events = int(rate_hz * seconds)
        records = self._play_and_receive(num_events, rate_hz)[num_events // 5 :]
        latencies_ms = [(one.latency_us or 0) / 1000 for one in records]
        p50, p95, p99 = np.percentile(latencies_ms, [50, 95, 99]).tolist()
        return Latency(rate_hz, len(records), p50, p95, p99)

    def backlog(self, num_events: int) -> float:
        """Events as fast as they can be produced; features per second over the middle 80 %."""
        records = self._play_and_receive(num_events, 1e9)
        times_us = sorted(one.appended_us for one in records)
        tenth = len(times_us) // 10
        middle = times_us[tenth:-tenth]
        return len(middle) / ((middle[-1] - middle[0]) / 1e6)

    def _play_and_receive(
        self, num_events: int, rate_hz: float, num_missing: int = 0
    ) -> list[FeatureRecord]:
        limit = num_events - num_missing
        with FeatureSubscriber(self._settings, limit=limit, idle_timeout_s=_IDLE_S) as subscriber:
            with MarketEventProducer(self._settings) as producer:
                for event, due_s in self._events(num_events, rate_hz):
                    if (ahead_s := due_s - time.perf_counter()) > 0:
                        time.sleep(ahead_s)
                    producer.produce(event)
            records = list(subscriber.records())
        if len(records) < limit:
            raise SystemExit(f"{len(records)} features of {limit} came within {_IDLE_S:g} s")
        return records

    def _events(self, num_events: int, rate_hz: float) -> Iterator[tuple[MarketEvent, float]]:
        """Events and when they are due on the clock of ``time.perf_counter``."""
        self._seed += 1
        begin_us, begin_s = int(time.time() * 1e6), time.perf_counter()
        tape_rate_hz = min(rate_hz, 10_000.0)
        for event in simulate(
            symbols=self._symbols,
            seed=self._seed,
            start_time_us=begin_us,
            rate_hz=tape_rate_hz,
            num_events=num_events,
        ):
            since_s = (event.event_time_us - begin_us) / 1e6
            yield event, begin_s + since_s * tape_rate_hz / rate_hz


def _median(rounds: list[Latency]) -> Latency:
    """Of each figure its median over the rounds."""
    columns = zip(*(asdict(one).values() for one in rounds), strict=True)
    return Latency(*(statistics.median(column) for column in columns))


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _table(report: dict[str, object]) -> str:
    lines = [f"{report['mode']} on {report['machine']}, {report['versions']}", ""]
    lines += ["| events/s | p50 ms | p95 ms | p99 ms |", "| --- | --- | --- | --- |"]
    latencies: list[dict[str, float]] = report["latency"]  # type: ignore[assignment]
    for one in latencies:
        figures = (one["rate_hz"], one["p50_ms"], one["p95_ms"], one["p99_ms"])
        lines.append("| " + " | ".join(f"{figure:.0f}" for figure in figures) + " |")
    if report["capacity_events_per_s"]:
        lines.append(f"\nbacklog: {report['capacity_events_per_s']:.0f} events/s")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
