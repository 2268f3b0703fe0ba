"""What being watched costs the worker: processor time per event, with and without.

    python -m benchmarks.observing [--events 20000] [--rounds 5] [--json]

Starts a broker and a Redis of its own. A worker with a small model works off the same backlog in
turns: plain; with ``metrics.port`` scraped every second; with traces of one event in a hundred; and
of every event. Microseconds of the worker process's processor time an event, from the first feature
to the last; ratios are to *plain* in the same round, medians over the rounds.
"""

import argparse
import json
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks.lanes.load import own_topics
from benchmarks.tape import Tape, parts, processor
from inference.artifact import save_artifact
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.settings import Settings
from tapeline.machine import this_machine
from tapeline.processes import free_ports

_SMALL = ModelConfig(conv_channels=(8,), lstm_hidden=16, lstm_layers=1, num_features=8)
_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Cost:
    """One way of being watched."""

    way: str
    us_an_event: float
    ratio: float
    least: float
    most: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    machine = str(this_machine())
    with parts() as settings, _collector() as collector:
        model = settings.state_dir / "small"
        save_artifact(seeded_artifact(config=_SMALL), model)
        ways = _ways(collector)
        rounds: list[dict[str, float]] = []
        for number in range(options.rounds):
            order = [*list(ways)[number % len(ways) :], *list(ways)[: number % len(ways)]]
            measured = {way: _measure(settings, model, ways[way], options.events) for way in order}
            rounds.append(measured)
    costs = [_cost(way, rounds) for way in ways]
    if options.json:
        print(json.dumps({"machine": machine, "costs": [asdict(one) for one in costs]}, indent=2))
        return
    print(f"{machine}; {options.rounds} rounds of {options.events:,} events\n")
    print("| watched by | us an event | to plain | least to most |")
    print("| --- | ---: | ---: | ---: |")
    for one in costs:
        print(
            f"| {one.way} | {one.us_an_event:.0f} | {one.ratio:.3f} "
            f"| {one.least:.3f} to {one.most:.3f} |"
        )


def _ways(collector: str) -> dict[str, dict[str, Any]]:
    def traced(ratio: float) -> dict[str, Any]:
        return {
            "tracing": {"enabled": True, "sample_ratio": ratio},
            "environment": {"OTEL_EXPORTER_OTLP_ENDPOINT": collector},
        }

    return {
        "nobody": {},
        "metrics, every second": {"metrics": {"port": free_ports(1)[0]}},
        "traces, 1 %": traced(0.01),
        "traces, all": traced(1.0),
    }
