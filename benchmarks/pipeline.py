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
import statistics
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.tape import Tape, parts, processor
from schemas.settings import Settings
from tapeline.machine import this_machine


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

    with parts() as settings:
        report = _measure(settings, options)
    print(json.dumps(report, indent=2) if options.json else _table(report))


def _measure(settings: Settings, options: argparse.Namespace) -> dict[str, object]:
    rates = [float(rate) for rate in options.rates.split(",")]
    machine = str(this_machine())
    tape = Tape(settings)
    with processor(settings, "worker" if options.mode == "worker" else "run"):
        tape.warm_up()
        rounds = [
            [_latency(tape, rate, options.seconds) for rate in rates] for _ in range(options.rounds)
        ]
        capacity = _capacity(tape, options.backlog) if options.backlog else None
    return {
        "machine": machine,
        "mode": options.mode,
        "latency": [asdict(_median(list(one))) for one in zip(*rounds, strict=True)],
        "capacity_events_per_s": capacity,
    }


def _latency(tape: Tape, rate_hz: float, seconds: float) -> Latency:
    """Of events at a rate; the first fifth is not counted."""
    num_events = int(rate_hz * seconds)
    passages = tape.play(num_events, rate_hz)[num_events // 5 :]
    latencies_ms = [(one.feature_us - one.event_us) / 1000 for one in passages]
    p50, p95, p99 = np.percentile(latencies_ms, [50, 95, 99]).tolist()
    return Latency(rate_hz, len(passages), p50, p95, p99)


def _capacity(tape: Tape, num_events: int) -> float:
    """Events as fast as they can be produced; features per second over the middle 80 %."""
    times_us = sorted(one.feature_us for one in tape.play(num_events, 1e9))
    tenth = len(times_us) // 10
    middle = times_us[tenth:-tenth]
    return len(middle) / ((middle[-1] - middle[0]) / 1e6)


def _median(rounds: list[Latency]) -> Latency:
    """Of each figure its median over the rounds."""
    columns = zip(*(asdict(one).values() for one in rounds), strict=True)
    return Latency(*(statistics.median(column) for column in columns))


def _table(report: dict[str, object]) -> str:
    lines = [f"{report['mode']} on {report['machine']}", ""]
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
