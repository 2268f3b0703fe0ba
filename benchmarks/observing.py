"""What being watched costs the worker: processor time per event, with and without.

    python -m benchmarks.observing [--events 20000] [--rounds 5] [--json]

Starts a broker and a Redis of its own. A worker with a small model works off a backlog in turns:
watched by nobody; with ``metrics.port`` scraped every second; with traces of one event in a
hundred; and of every event. Microseconds of the worker process's processor time an event, from the
first feature to the last; ratios are to *nobody* in the same round, medians over the rounds.
"""

import argparse
import json
import os
import statistics
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from schemas.sla import MetricsSettings, TracingSettings
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
    print("| watched by | us an event | to nobody | least to most |")
    print("| --- | ---: | ---: | ---: |")
    for one in costs:
        print(
            f"| {one.way} | {one.us_an_event:.0f} | {one.ratio:.3f} "
            f"| {one.least:.3f} to {one.most:.3f} |"
        )


def _ways(collector: str) -> dict[str, dict[str, Any]]:
    """The sections of the settings that differ."""
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = collector  # only those that trace look at it
    return {
        "nobody": {},
        "metrics, every second": {"metrics": MetricsSettings(port=free_ports(1)[0])},
        "traces, 1 %": {"tracing": TracingSettings(enabled=True, sample_ratio=0.01)},
        "traces, all": {"tracing": TracingSettings(enabled=True, sample_ratio=1)},
    }


def _measure(settings: Settings, model: Path, watched: dict[str, Any], num_events: int) -> float:
    with own_topics(settings, settings.lanes) as own:
        artifact = own.model.model_copy(update={"artifact": model})
        own = own.model_copy(update={"model": artifact, **watched})
        tape = Tape(own)
        with processor(own) as worker, _scraped(own.metrics.port):
            tape.warm_up()
            before = worker.cpu_times()
            tape.play(num_events, 1e9)
            after = worker.cpu_times()
    return 1e6 * (after.user + after.system - before.user - before.system) / num_events


@contextmanager
def _scraped(port: int) -> Iterator[None]:
    """Its metrics asked for every second, as Prometheus does at the fastest."""
    ended = threading.Event()

    def ask() -> None:
        while not ended.wait(_EVERY_S):
            with (
                suppress(OSError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as it,
            ):
                it.read()

    thread = threading.Thread(target=ask, daemon=True)
    if port:
        thread.start()
    yield
    ended.set()


@contextmanager
def _collector() -> Iterator[str]:
    """Takes spans and forgets them."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Not a line for every request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _cost(way: str, rounds: list[dict[str, float]]) -> Cost:
    ratios = [one[way] / one["nobody"] for one in rounds]
    us = statistics.median(one[way] for one in rounds)
    return Cost(way, us, statistics.median(ratios), min(ratios), max(ratios))


if __name__ == "__main__":
    main()
