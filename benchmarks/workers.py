"""Events a second by the number of workers: each a process of its own, on one lane.

    python -m benchmarks.workers [--workers 1 --workers 2] [--events 200000] [--partitions 16]
        [--symbols 96] [--kind mixed] [--real] [--redis 1] [--fetch-wait-ms 0]
        [--rate 0] [--seconds 10] [--json]

Starts a broker and a Redis of its own, or several of these. The workers share a lane's partitions,
and their windows are full; then they are stopped (SIGSTOP), a backlog is appended, and they go on
at once. Features a second by the growth of the output topic, over the middle 60 % of the backlog;
processor time of all workers an event; cores that the broker and Redis took meanwhile. The model is
a mean over a few channels (``benchmarks/compare/run_tapeline.py``), so that the stream is what is
measured; with ``--real`` it is the settings' model, in each worker's process (``tapeline worker``).

With ``--rate`` events then arrive at that rate, whether or not the workers keep up (open loop),
from processes of up to 50,000 a second each: milliseconds from an event's append to its feature's,
by the broker's clock, of the output topic's fullest partition; and the workers' processor time an
event meanwhile.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
from confluent_kafka import Consumer, Message, Producer, TopicPartition

from benchmarks.lanes.load import own_topics
from benchmarks.stages import KINDS
from benchmarks.tape import parts, print_rows
from schemas.codec import Codec
from schemas.kafka import IDEMPOTENT, client_config, make_client
from schemas.settings import Settings, as_environment, load_settings
from tapeline.machine import this_machine
from tapeline.simulator import simulate, symbol_names
from tapeline.stack import Stack

_LANE = "realtime"
_SCRIPT = Path(__file__).parent / "compare" / "run_tapeline.py"
_SCHEMAS = Path(__file__).parents[1] / "schemas"
_WORKER = ["-m", "tapeline", "worker"]
_TAPE_EVENTS = 50_000
_WARM_UP_PER_SYMBOL = 200
_TICK_S = 0.1
_RATE_OF_ONE_HZ = 50_000.0
_SENT_EVERY_S = 0.001
_MAX_LATE_S = 1.0
_WORK_S = 300.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, action="append")
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--partitions", type=int, default=16)
    parser.add_argument("--symbols", type=int, default=96)
    parser.add_argument("--kind", choices=("mixed", *KINDS), default="mixed")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--redis", type=int, default=1)
    parser.add_argument("--fetch-wait-ms", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    machine = str(this_machine())
    found = []
    changes: dict[str, Any] = {
        "kafka": {"num_partitions": options.partitions},
        "worker": {"session_timeout_s": _WORK_S / 2},  # they are stopped while a backlog is made
        "lanes": {_LANE: {"fetch_wait_ms": options.fetch_wait_ms}},
    }
    with ExitStack() as opened:
        more_urls = [opened.enter_context(_one_more_redis()) for _ in range(options.redis - 1)]
        settings = opened.enter_context(parts(redis={"more_urls": more_urls}, **changes))
        tape = _Tape(settings, options.symbols, options.kind)
        for number in options.workers or [1, 2]:
            found.append(_measure(settings, tape, number, options))
            print(found[-1], file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"machine": machine, "rows": found}, indent=2))
        return
    print(f"{machine}; {options.events:,} events, {options.kind}\n")
    print_rows([{key: f"{value:,.4g}" for key, value in row.items()} for row in found])


@contextmanager
def _one_more_redis() -> Iterator[str]:
    """Its URL."""
    with TemporaryDirectory() as folder:
        stack = Stack.on_free_ports(load_settings(state_dir=Path(folder)))
        try:
            stack.start("redis")
            assert stack.settings.redis.url
            yield stack.settings.redis.url
        finally:
            stack.down(purge=True)


class _Tape:
    """Encoded events without end: a simulated market again and again, each event with an id of its
    own. All symbols have equally many, so that a warm-up fills every window.
    """

    def __init__(self, settings: Settings, num_symbols: int, kind: str) -> None:
        codec = Codec(settings.schema_registry)
        tape = simulate(symbols=symbol_names(num_symbols), seed=1, start_time_us=10**15)
        self.num_symbols = num_symbols
        missing = Counter(dict.fromkeys(symbol_names(num_symbols), _TAPE_EVENTS // num_symbols))
        self._events: list[tuple[bytes, bytes, bytes]] = []
        while missing.total():
            event = next(tape)
            wanted = kind == "mixed" or isinstance(event.payload, KINDS[kind])
            if wanted and missing[event.symbol]:
                missing[event.symbol] -= 1
                encoded = codec.encode_event(event), event.event_id.encode()
                self._events.append((event.symbol.encode(), *encoded))
        self._at = 0  # in the tape
        self._number = 0  # of the next event's id

    def play(self, settings: Settings, rate_hz: float, seconds: float) -> list[BaseProcess]:
        """Goes on at a rate, in processes of their own; a process fails if it is late.

        Each has symbols of its own, whose events stay in order.
        """
        number = math.ceil(rate_hz / _RATE_OF_ONE_HZ)
        num_events = int(rate_hz * seconds) // number
        ahead = self._events[self._at :] + self._events[: self._at]
        symbols = sorted({symbol for symbol, _, _ in self._events})
        playing: list[BaseProcess] = []
        for place in range(number):
            share = set(symbols[place::number])
            part = copy(self)
            part._events = [one for one in ahead if one[0] in share]
            part._at = 0
            part._number = self._number + place * num_events
            one = get_context("spawn").Process(
                target=part.send, args=(settings, num_events, rate_hz / number)
            )
            one.start()
            playing.append(one)
        self._number += number * num_events
        return playing

    def send(self, settings: Settings, num_events: int, rate_hz: float = math.inf) -> None:
        """Appends so many to the lane's topic. Raises SystemExit if it cannot keep a rate."""
        linger_ms = 20 if rate_hz == math.inf else 1
        config = {"linger.ms": linger_ms, "queue.buffering.max.messages": 1_000_000}
        producer: Producer = make_client(
            Producer, client_config(settings, defaults=config, required=IDEMPOTENT)
        )
        topic = settings.lane(_LANE).topic
        at_once = max(1, int(rate_hz * _SENT_EVERY_S)) if rate_hz < math.inf else num_events
        begun_s, late_s = time.monotonic(), 0.0
        for sent in range(num_events):
            if sent % at_once == 0 and rate_hz < math.inf:
                ahead_s = begun_s + sent / rate_hz - time.monotonic()
                late_s = max(late_s, -ahead_s)
                time.sleep(max(ahead_s, 0))
            key, value, event_id = self._events[self._at]
            self._at = (self._at + 1) % len(self._events)
            begin = 11  # the tag and the length of the id
            fresh = f"{self._number:0{len(event_id)}d}".encode()
            self._number += 1
            producer.produce(topic, value[:begin] + fresh + value[begin + len(fresh) :], key)
            if self._number % 1_000 == 0:
                producer.poll(0)
        assert producer.flush(120) == 0
        if late_s > _MAX_LATE_S:
            raise SystemExit(f"the load was {late_s:.1f} s late; lower --rate")


def _measure(
    settings: Settings, tape: _Tape, num_workers: int, options: argparse.Namespace
) -> dict[str, float]:
    num_events = options.events
    with own_topics(settings, {_LANE: settings.lane(_LANE)}) as own:
        ends = _Ends(own)
        begun_s = time.monotonic()
        with _workers(own, num_workers, real=options.real) as workers:
            tape.send(own, _WARM_UP_PER_SYMBOL * tape.num_symbols)
            start_s = ends.wait_until_quiet(workers) - begun_s
            for worker in workers:
                worker.suspend()
            tape.send(own, num_events)
            before = ends.total()
            used_s, servers_s = _cpu_s(workers), _servers_cpu_s()
            for worker in workers:
                worker.resume()
            times_s, counts = ends.watch(before + num_events)
            used_s = _cpu_s(workers) - used_s
            cores = {
                f"{name}_cores": (after_s - servers_s[name]) / (times_s[-1] - times_s[0])
                for name, after_s in _servers_cpu_s().items()
            }
            memory_mb = sum(worker.memory_full_info().pss for worker in workers) / 1e6
            latency = {}
            if options.rate:
                used_at_rate_s = _cpu_s(workers)
                playing = tape.play(own, options.rate, options.seconds)
                latency = ends.latency(playing)
                used_at_rate_s = _cpu_s(workers) - used_at_rate_s
                latency["us_at_rate"] = 1e6 * used_at_rate_s / (options.rate * options.seconds)
    low, high = (np.searchsorted(counts, before + share * num_events) for share in (0.2, 0.8))
    rate = (counts[high] - counts[low]) / (times_s[high] - times_s[low])
    us = 1e6 * used_s / num_events
    return {
        "workers": num_workers,
        "events_per_s": float(rate),
        "us_an_event": us,
        "events_per_s_a_core": 1e6 / us,
        **cores,
        "memory_mb": memory_mb,
        "first_features_s": start_s,
        **latency,
    }


def _cpu_s(workers: Sequence[psutil.Process]) -> float:
    return sum(sum(worker.cpu_times()[:2]) for worker in workers)


def _servers_cpu_s() -> dict[str, float]:
    """Of the broker and of Redis, which run under this process."""
    found = {"broker": "java", "redis": "redis-server"}
    running = psutil.Process().children(recursive=True)
    return {
        name: sum(sum(one.cpu_times()[:2]) for one in running if one.name().startswith(program))
        for name, program in found.items()
    }


@contextmanager
def _workers(settings: Settings, number: int, *, real: bool) -> Iterator[list[psutil.Process]]:
    """So many worker processes; killed in the end."""
    paths = [str(_SCHEMAS.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | as_environment(settings)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment["COMPARE_SCHEMAS"] = str(_SCHEMAS)
    log = settings.state_dir / "workers.log"
    with log.open("ab") as output:
        running = [
            subprocess.Popen(
                [sys.executable, *(_WORKER if real else [str(_SCRIPT)])],
                env=environment,
                stdout=output,
                stderr=output,
            )
            for _ in range(number)
        ]
    try:
        yield [psutil.Process(one.pid) for one in running]
        if any(one.poll() is not None for one in running):
            raise SystemExit(f"a worker ended by itself:\n{log.read_text()[-3_000:]}")
    finally:
        for one in running:
            one.kill()
            one.wait()


class _Ends:
    """How many features there are, by the ends of the output topic's partitions."""

    def __init__(self, settings: Settings) -> None:
        self._consumer: Consumer = make_client(
            Consumer, client_config(settings, defaults={"group.id": "ends"})
        )
        topic, number = settings.lane(_LANE).output_topic, settings.kafka.num_partitions
        self._partitions = [TopicPartition(topic, one) for one in range(number)]
        self._codec = Codec(settings.schema_registry)

    def total(self) -> int:
        return sum(self._consumer.get_watermark_offsets(one)[1] for one in self._partitions)

    def wait_until_quiet(self, workers: Sequence[psutil.Process]) -> float:
        """Until features have come and no more come; when the first was seen."""
        first_s, last, last_s = 0.0, 0, time.monotonic()
        while not last or time.monotonic() - last_s < 3:
            time.sleep(_TICK_S)
            if (total := self.total()) > last:
                last, last_s = total, time.monotonic()
                first_s = first_s or last_s
            elif any(one.status() == psutil.STATUS_ZOMBIE for one in workers):
                return first_s  # which is said where they were started
            elif time.monotonic() - last_s > _WORK_S:
                raise SystemExit("no features came")
        return first_s

    def latency(self, playing: Sequence[BaseProcess]) -> dict[str, float]:
        """From append to append, of the fullest partition's features while a load is played.

        The first fifth is left out: the load's processes start. Raises SystemExit if the load was
        late.
        """
        ends = [self._consumer.get_watermark_offsets(one)[1] for one in self._partitions]
        end, fullest = max(zip(ends, self._partitions, strict=True), key=itemgetter(0))
        self._consumer.assign([TopicPartition(fullest.topic, fullest.partition, end)])
        found_ms: list[float] = []
        is_over, messages = False, list[Message]()
        while not is_over or messages:
            is_over = not any(one.is_alive() for one in playing)
            messages = self._consumer.consume(10_000, timeout=1.0)
            for message in messages:
                feature = self._codec.decode_feature(message.value())
                found_ms.append(message.timestamp()[1] - feature.source_appended_us / 1_000)
        self._consumer.unassign()
        if any(one.exitcode for one in playing):
            raise SystemExit("the load could not be kept up")
        kept = np.array(found_ms[len(found_ms) // 5 :])
        return {f"p{one}_ms": float(np.percentile(kept, one)) for one in (50, 95, 99)}

    def watch(self, until: int) -> tuple[list[float], list[int]]:
        """Times and totals until there are so many."""
        times_s, counts = [time.monotonic()], [self.total()]
        while counts[-1] < until:
            if times_s[-1] - times_s[0] > _WORK_S:
                raise SystemExit(f"{until - counts[-1]} features are missing")
            time.sleep(_TICK_S)
            counts.append(self.total())
            times_s.append(time.monotonic())
        return times_s, counts


if __name__ == "__main__":
    main()
