"""What the benchmarks of the whole stream share: the parts, the processor, the load."""

import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import psutil
from prometheus_client.parser import text_string_to_metric_families

from schemas.messages import MarketEvent
from schemas.settings import Settings, as_environment, load_settings
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.stack import Stack
from tapeline.subscriber import FeatureSubscriber
from tapeline.topics import ensure_topics

NUM_SYMBOLS = 10
WARM_UP_EVENTS = 59  # of a symbol; they give no feature
_WARM_UP_RATE_HZ = 2_000.0
_IDLE_S = 60.0


@contextmanager
def parts(**overrides: Any) -> Iterator[Settings]:
    """A broker and a Redis of our own with the lanes' topics; the settings that reach them."""
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack.on_free_ports(load_settings(state_dir=Path(folder), **overrides))
        try:
            stack.up()
            ensure_topics(stack.settings)
            yield stack.settings
        finally:
            stack.down(purge=True)


def print_rows(rows: Sequence[Mapping[str, object]], *, num_left: int = 0) -> None:
    """A Markdown table of rows with the same keys; the first so many columns to the left."""
    aligned = [" --- |"] * num_left + [" ---: |"] * (len(rows[0]) - num_left)
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "".join(aligned))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


@contextmanager
def processor(settings: Settings, mode: str = "worker") -> Iterator[psutil.Process]:
    """``tapeline worker`` or ``tapeline run`` in a process of its own.

    Raises SystemExit with the end of its log if it ended by itself.
    """
    with module_process(settings, ("tapeline", mode)) as process:
        yield process


@contextmanager
def module_process(settings: Settings, arguments: Sequence[str]) -> Iterator[psutil.Process]:
    """``python -m`` with these arguments and settings, in a process of its own; like ``processor``.

    It ends on SIGTERM, within two minutes.
    """
    log = settings.state_dir / "processor.log"
    command = [sys.executable, "-m", *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | as_environment(settings), stdout=output, stderr=output
        )
    try:
        yield psutil.Process(process.pid)
    finally:
        failed = process.poll() is not None
        process.terminate()
        process.wait(120)
        if failed:
            raise SystemExit(f"the processor ended early:\n{log.read_text()[-2_000:]}")


def worker_metrics(settings: Settings) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """Name, labels and value of every sample of the worker on ``metrics.port``."""
    url = f"http://127.0.0.1:{settings.metrics.port}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


class Passage(NamedTuple):
    """One event's way: when the broker appended it and its feature, and when that was read.

    Unix epoch. Appends are on the broker's clock, in ms; the reading is on this machine's, in us.

    Attributes:
        stages_ms: where its time went; empty unless ``worker.timing_header``.
    """

    event_us: int
    feature_us: int
    read_us: int
    stages_ms: Mapping[str, float] = MappingProxyType({})

    @property
    def read_ms(self) -> float:
        """From the event's append to the feature's reading."""
        return (self.read_us - self.event_us) / 1000


class Tape:
    """A simulated market in the first lane, and the features that come of it.

    Windows stay full from one play to the next, and from one processor to the next.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._symbols = symbol_names(NUM_SYMBOLS)
        self._seed = 0

    def warm_up(self) -> None:
        """Fills every window, and waits until features flow."""
        num_missing = 0 if self._seed else WARM_UP_EVENTS * NUM_SYMBOLS
        self.play(200 * NUM_SYMBOLS, _WARM_UP_RATE_HZ, num_missing=num_missing)

    def play(self, num_events: int, rate_hz: float, *, num_missing: int = 0) -> list[Passage]:
        """Events at a rate, whether or not the processor keeps up (open loop), read meanwhile.

        Raises SystemExit if fewer than all but ``num_missing`` features come of them.
        """
        limit = num_events - num_missing
        subscriber = FeatureSubscriber(self._settings, limit=limit, idle_timeout_s=_IDLE_S)
        with subscriber:
            reader = Reader(subscriber)
            with MarketEventProducer(self._settings) as producer:
                for event in self.due(num_events, rate_hz):
                    producer.produce(event)
            passages = reader.join()
        if len(passages) < limit:
            raise SystemExit(f"{len(passages)} features of {limit} came within {_IDLE_S:g} s")
        return passages

    def due(self, num_events: int, rate_hz: float) -> Iterator[MarketEvent]:
        """Yields each event when it is due; late ones at once."""
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
            since_s = (event.event_time_us - begin_us) / 1e6 * tape_rate_hz / rate_hz
            if (ahead_s := begin_s + since_s - time.perf_counter()) > 0:
                time.sleep(ahead_s)
            yield event


class Reader:
    """Reads an open subscriber in a thread of its own, until its limit or its idle timeout."""

    def __init__(self, subscriber: FeatureSubscriber) -> None:
        self._subscriber = subscriber
        self._passages: list[Passage] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read", daemon=True)
        self._thread.start()

    def take(self) -> list[Passage]:
        """What has been read since the last call. Raises what the reading ended with."""
        if self._error:
            raise self._error
        taken = self._passages[:]
        del self._passages[: len(taken)]
        return taken

    def join(self) -> list[Passage]:
        """What is left, once the reading has ended."""
        self._thread.join()
        return self.take()

    def _run(self) -> None:
        try:
            for record in self._subscriber.records():
                source_us = record.source_appended_us
                assert source_us is not None
                read_us = _now_us()
                self._passages.append(
                    Passage(source_us, record.appended_us, read_us, record.timing_ms)
                )
        except BaseException as error:
            self._error = error


def _now_us() -> int:
    return time.time_ns() // 1_000
