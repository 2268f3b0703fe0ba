"""Tapeline beside its peers: the same events, broker, model and machine, in turns.

    python -m benchmarks.compare [--rounds 5] [--kills 1] [--backlog 20000] [--seconds 6]
        [--max-rate 4000] [--only tapeline,quix] [--json]

Contenders: Tapeline's worker; Quix Streams, Faust-streaming and arroyo, each as its documentation
shows it, pinned (``requirements``) and in an environment of its own; and the loop that one writes
in an afternoon with confluent-kafka and ``@serve.batch``. All do the work of ``work.py``; Tapeline
more (``run_tapeline.py``). Each gets topics of its own on one broker. In each round, each in turn:

- a backlog appended at once: events/s over the middle 80 %, by the broker's clock; processor time
  of all its processes an event, and from it events/s a core;
- half of that rate, at most ``--max-rate`` (the load takes some of the machine, too): latency from
  append to append; resident memory;
- in the first ``--kills`` rounds the same rate again, and ``kill -9`` to all its processes in the
  middle, then a new start: the longest silence, events without a feature, and with two.

Medians over the rounds, least to most in brackets.
"""

import argparse
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import psutil
from confluent_kafka import Consumer, TopicPartition

from benchmarks.lanes.load import Encoded, Feed, Sender, own_topics
from benchmarks.tape import parts
from schemas.settings import Settings, as_environment
from tapeline.machine import this_machine

_FOLDER = Path(__file__).parent
_SCHEMAS = Path(__file__).parents[2] / "schemas"
_PEERS = ("quix", "faust", "arroyo")
_ALL = ("tapeline", *_PEERS, "loop")
_LANE = "realtime"
_TICK_S = 0.005
_START_S, _WORK_S = 120.0, 180.0
_QUIET_S = 75.0  # longer than any contender's session timeout
_RATE_HZ = 1_000.0  # of the tape
_TAG_BYTES = 10  # which schema wrote a message
_avro = {
    name: fastavro.parse_schema(json.loads((_SCHEMAS / f"{name}.avsc").read_text()))
    for name in ("market_event", "feature_vector")
}


@dataclass(frozen=True, slots=True)
class Death:
    """What came of a ``kill -9`` and a new start.

    Attributes:
        silent_s: the longest time without a feature.
        lost, twice: events without a feature, and with two.
    """

    silent_s: float
    lost: int
    twice: int


@dataclass(frozen=True, slots=True)
class Result:
    """One contender in one round."""

    events_per_s: float
    us_an_event: float
    per_core: float
    half_rate_hz: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    memory_mb: float
    death: Death | None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backlog", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=6, help="of half the rate")
    parser.add_argument("--max-rate", type=float, default=4_000)
    parser.add_argument("--kills", type=int, default=1, help="rounds with a kill -9")
    parser.add_argument("--only", default=",".join(_ALL))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.only.split(",")
    pythons = {name: _environment(name) for name in names}
    machine = str(this_machine())
    rounds: list[dict[str, Result]] = []
    with parts() as settings:
        num_events = options.backlog + 2 * int(options.seconds * options.max_rate)
        feed = Feed(settings, _LANE, num_events, _RATE_HZ)
        for number in range(options.rounds):
            order = [*names[number % len(names) :], *names[: number % len(names)]]
            one = {}
            for name in order:
                one[name] = _measure(
                    settings, name, pythons[name], feed, options, kills=number < options.kills
                )
                print(f"round {number + 1}, {name}: {one[name]}", file=sys.stderr, flush=True)
            rounds.append(one)
    if options.json:
        found = [{name: asdict(result) for name, result in one.items()} for one in rounds]
        print(json.dumps({"machine": machine, "rounds": found}, indent=2))
        return
    print(f"{machine}; {options.rounds} rounds\n")
    names_of = [field.name for field in fields(Result) if field.name != "death"]
    print("| | " + " | ".join(names_of) + " | silent_s | lost | twice |")
    print("| --- |" + " ---: |" * (len(names_of) + 3))
    for name in names:
        results = [one[name] for one in rounds]
        cells = [_cell([getattr(one, field) for one in results]) for field in names_of]
        deaths = [one.death for one in results if one.death]
        for field in ("silent_s", "lost", "twice"):
            cells.append(_cell([getattr(one, field) for one in deaths]) if deaths else "-")
        print(f"| {name} | {' | '.join(cells)} |")


def _cell(values: Sequence[float]) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    digits = 1 if middle < 100 and middle != int(middle) else 0
    if least == most:
        return f"{middle:,.{digits}f}"
    return f"{middle:,.{digits}f} ({least:,.{digits}f} to {most:,.{digits}f})"


def _environment(name: str) -> str:
    """The interpreter of a contender; a peer's environment is made if it is not there."""
    if name not in _PEERS:
        return sys.executable
    folder = Path(".tapeline/compare") / name
    python = folder / "bin" / "python"
    requirements = _FOLDER / "requirements" / f"{name}.txt"
    done = folder / "requirements.txt"
    if not done.exists() or done.read_text() != requirements.read_text():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--quiet", "--clear", str(folder)], check=True)
        subprocess.run(
            [*uv, "pip", "install", "--quiet", "--python", str(python), "-r", str(requirements)],
            check=True,
        )
        shutil.copy(requirements, done)
    return str(python)


def _measure(
    settings: Settings,
    name: str,
    python: str,
    feed: Feed,
    options: argparse.Namespace,
    *,
    kills: bool,
) -> Result:
    lane = settings.lane(_LANE)
    with own_topics(settings, {_LANE: lane}) as own, Sender(own) as sender:
        topics = _Topics(own)
        contender = _Contender(name, python, own)
        try:
            contender.start()
            sender.send(_LANE, feed.warm_up)
            topics.wait_for(feed.warm_up[-1:], _START_S)
            backlog = feed.play[: options.backlog]
            before_s = contender.cpu_s()
            sender.send(_LANE, backlog)
            topics.wait_for(backlog, _WORK_S)
            used_s = contender.cpu_s() - before_s
            rate = topics.rate(backlog)
            half_hz = min(rate / 2, options.max_rate)
            num_half = int(options.seconds * half_hz)
            first = feed.play[len(backlog) : len(backlog) + num_half]
            second = feed.play[len(backlog) + num_half : len(backlog) + 2 * num_half]
            _send_at(sender, first, half_hz)
            topics.wait_for(first, _WORK_S)
            p50_ms, p95_ms, p99_ms = np.percentile(topics.latencies_ms(first), [50, 95, 99])
            memory_mb = contender.memory_mb()
            death = None
            if kills:
                middle = len(second) // 2
                _send_at(sender, second[:middle], half_hz)
                contender.kill()
                contender.start()
                _send_at(sender, second[middle:], half_hz)
                topics.wait_until_quiet(second)
                death = topics.death(second, [*backlog, *first, *second])
        finally:
            contender.kill()
    us_an_event = 1e6 * used_s / len(backlog)
    return Result(
        events_per_s=rate,
        us_an_event=us_an_event,
        per_core=1e6 / us_an_event,
        half_rate_hz=half_hz,
        p50_ms=float(p50_ms),
        p95_ms=float(p95_ms),
        p99_ms=float(p99_ms),
        memory_mb=memory_mb,
        death=death,
    )


def _send_at(sender: Sender, events: Sequence[Encoded], rate_hz: float) -> None:
    """Evenly; those of a tick together, or the load would take most of a core from them."""
    a_tick = max(1, round(rate_hz * _TICK_S))
    timed = [
        one._replace(at_s=number // a_tick * a_tick / rate_hz) for number, one in enumerate(events)
    ]
    sender.send_when_due(_LANE, timed, time.monotonic())


class _Contender:
    """A contender's processes."""

    def __init__(self, name: str, python: str, settings: Settings) -> None:
        self._command = [python, str(_FOLDER / f"run_{name}.py")]
        lane = settings.lane(_LANE)
        ours = {
            "COMPARE_BROKER": settings.kafka.bootstrap_servers,
            "COMPARE_TOPIC_IN": lane.topic,
            "COMPARE_TOPIC_OUT": lane.output_topic,
            "COMPARE_GROUP": lane.group,
            "COMPARE_SCHEMAS": str(_SCHEMAS),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._environment = os.environ | ours
        if name == "tapeline":
            self._environment |= as_environment(settings)
            paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
            self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._log = settings.state_dir / f"{name}.log"
        self._process: psutil.Popen | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = psutil.Popen(
                self._command, env=self._environment, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """As the kernel does when memory ends: nobody cleans up."""
        for process in self._all():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        if self._process is not None:
            self._process.wait()

    def cpu_s(self) -> float:
        if self._process is None or not self._process.is_running():
            raise SystemExit(f"a contender ended by itself:\n{self._log.read_text()[-3_000:]}")
        return sum(sum(one.cpu_times()[:2]) for one in self._all())

    def memory_mb(self) -> float:
        """Proportional shares: what processes share counts once."""
        return sum(one.memory_full_info().pss for one in self._all()) / 1e6

    def _all(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        try:
            return [*self._process.children(recursive=True), self._process]
        except psutil.NoSuchProcess:
            return []


class _Topics:
    """A contender's topics, read from their beginning as they grow."""

    def __init__(self, settings: Settings) -> None:
        lane = settings.lane(_LANE)
        self._in = _Reader(settings, lane.topic, "market_event")
        self._out = _Reader(settings, lane.output_topic, "feature_vector")

    def wait_for(self, events: Sequence[Encoded], timeout_s: float) -> None:
        """Until each of them has its feature."""
        wanted = {_event_id(one.value) for one in events}
        deadline_s = time.monotonic() + timeout_s
        while wanted := {one for one in wanted if one not in self._out.appended_ms}:
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{len(wanted)} events have no feature after {timeout_s:g} s")
            self._out.read(0.2)

    def wait_until_quiet(self, events: Sequence[Encoded]) -> None:
        """Until each has its feature, or nothing comes any more."""
        wanted = {_event_id(one.value) for one in events}
        last_s = time.monotonic()
        while time.monotonic() - last_s < _QUIET_S:
            if self._out.read(0.2):
                last_s = time.monotonic()
            if wanted <= self._out.appended_ms.keys():
                break
        while self._out.read(2.0):
            pass

    def rate(self, events: Sequence[Encoded]) -> float:
        """Features a second over the middle 80 %."""
        times_ms = sorted(self._out.appended_ms[_event_id(one.value)][0] for one in events)
        tenth = len(times_ms) // 10
        middle = times_ms[tenth:-tenth]
        return 1000 * len(middle) / max(1, middle[-1] - middle[0])

    def latencies_ms(self, events: Sequence[Encoded]) -> list[int]:
        ids = [_event_id(one.value) for one in events]
        while any(one not in self._in.appended_ms for one in ids):
            self._in.read(0.2)
        return [self._out.appended_ms[one][0] - self._in.appended_ms[one][0] for one in ids]

    def death(self, around: Sequence[Encoded], all_events: Sequence[Encoded]) -> Death:
        """Silence among the events around it; lost and twice of all."""
        out = self._out.appended_ms
        times_ms = sorted(ms for one in around for ms in out.get(_event_id(one.value), ()))
        numbers = [len(out.get(_event_id(one.value), ())) for one in all_events]
        silent_ms = max(np.diff(times_ms)) if len(times_ms) > 1 else 0
        return Death(silent_ms / 1000, numbers.count(0), sum(number > 1 for number in numbers))


class _Reader:
    """All of a topic: when each event's record was appended, by event id."""

    def __init__(self, settings: Settings, topic: str, schema: str) -> None:
        self._schema = schema
        self._consumer = Consumer(
            {
                "bootstrap.servers": settings.kafka.bootstrap_servers,
                "group.id": "compare",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
            }
        )
        numbers = range(settings.kafka.num_partitions)
        self._consumer.assign([TopicPartition(topic, number, 0) for number in numbers])
        self.appended_ms: dict[str, list[int]] = {}

    def read(self, wait_s: float) -> int:
        """How many there were."""
        messages = [one for one in self._consumer.consume(10_000, wait_s) if not one.error()]
        for message in messages:
            event_id = _event_id(message.value() or b"", self._schema)
            self.appended_ms.setdefault(event_id, []).append(message.timestamp()[1])
        return len(messages)


def _event_id(value: bytes, schema: str = "market_event") -> str:
    record: Any = fastavro.schemaless_reader(io.BytesIO(value[_TAG_BYTES:]), _avro[schema], None)
    return str(record["event_id"])


if __name__ == "__main__":
    main()
