"""``tapeline demo``: the whole processor on one machine, and an account of every event.

Ray Serve, workers and model are the real ones. Two parts are stand-ins, and say so on screen:
librdkafka's mock cluster for Kafka, and a table in the worker's memory for Redis.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from confluent_kafka import Producer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from consumers.metrics import LaneCounts, WorkerStatistics
from schemas.kafka import LOGGER
from schemas.settings import Settings, load_settings
from tapeline.app import ServeApplication, ray_session, total_counts
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.subscriber import FeatureSubscriber

_SETTLE_S = 60.0
_LOOK_EVERY_S = 0.5
_SYMBOLS_OF_LANE = {
    "realtime": 4, "market-data": 3, "batch": 1, "historical": 1, "background": 1,
}  # fmt: skip
_DUPLICATE_EVERY = 100
_POISON = (b"", b"\x00\x01\x02 not Avro", b"\xff" * 64)


@dataclass(frozen=True, slots=True)
class LaneReport:
    """One lane's account.

    Attributes:
        produced: records acknowledged by the broker, duplicates and poison on purpose included.
        counts: what the workers say became of them.
        received: features that the subscriber got.
        latency_ms: p50, p95 and p99 from the event's append to the feature's receipt.
    """

    produced: int
    counts: LaneCounts
    received: int
    latency_ms: tuple[float, float, float] | None

    @property
    def unaccounted(self) -> int:
        """Records without an end, and features that did not arrive; 0 in a good run."""
        return abs(self.produced - self.counts.records + self.counts.in_flight) + abs(
            self.counts.features - self.received
        )


@dataclass(frozen=True, slots=True)
class DemoReport:
    """What a demo showed."""

    lanes: Mapping[str, LaneReport]
    batch_sizes: Mapping[int, int]
    model_version: str

    @property
    def is_complete(self) -> bool:
        """Every event has an end, and every feature arrived."""
        return all(lane.unaccounted == 0 and lane.produced > 0 for lane in self.lanes.values())

    def print(self) -> None:
        """Tables on stdout."""
        from tapeline.cli.terminal import out, print_table

        print_table(
            ("lane", "events in", "features out", "warm-up", "duplicates", "dead letters",
             "unaccounted", "p50 ms", "p95 ms", "p99 ms"),
            [
                (name, lane.produced, lane.received, lane.counts.warm_up, lane.counts.duplicates,
                 lane.counts.dead_letters, lane.unaccounted, *(lane.latency_ms or (None,) * 3))
                for name, lane in self.lanes.items()
            ],
            title="every event, and what became of it",
        )  # fmt: skip
        print_table(
            ("windows a call, up to", "calls"),
            list(self.batch_sizes.items()),
            title="micro-batches",
        )
        verdict = "every event is accounted for" if self.is_complete else "EVENTS ARE MISSING"
        out().print(f"model {self.model_version}: {verdict}")


def run_demo(*, seconds: float, rate_hz: float, seed: int, console: Console) -> DemoReport:
    """Runs it: starts everything, produces, waits for the last feature, takes everything down."""
    console.print(
        "[bold]Tapeline demo[/]: market events in, features out\n"
        "  broker       librdkafka's mock cluster, a stand-in (`tapeline up` starts a real Kafka)\n"
        "  duplicates   a table in the worker's memory, a stand-in for Redis\n"
        "  model        seeded weights: the arithmetic is real, the features mean nothing yet\n"
        "  Ray Serve    real, on this machine"
    )
    with embedded_broker() as settings:
        with console.status("starting Ray and loading the model"):
            session = ray_session(settings, log_to_driver=False)
            session.__enter__()
        application = ServeApplication(settings)
        try:
            with console.status("deploying worker and model"):
                application.deploy()
            return _Tape(settings, application).play(seconds, rate_hz, seed, console)
        finally:
            with console.status("taking everything down"):
                application.delete()
                session.__exit__(None, None, None)


@contextmanager
def embedded_broker() -> Iterator[Settings]:
    """librdkafka's mock cluster in this process, and settings that use it and no Redis.

    It keeps 5 MiB a partition and guarantees nothing: for demos, never as evidence of delivery.
    """
    cluster = Producer({"test.mock.num.brokers": 1, "logger": LOGGER})
    (broker,) = cluster.list_topics(timeout=10).brokers.values()
    settings = load_settings(
        kafka={
            "bootstrap_servers": f"{broker.host}:{broker.port}",
            # A real broker answers a waiting fetch when data comes; the mock only when time is up.
            "client": {"fetch.wait.max.ms": 5},
        },
        redis={"url": None},
    )
    for lane in settings.active_lanes:
        for topic in (lane.topic, lane.output_topic, lane.dlq_topic):
            cluster.list_topics(topic, timeout=10)  # asking for a topic makes it
    yield settings


class _Tape:
    """One run: what was produced, and what came back."""

    def __init__(self, settings: Settings, application: ServeApplication) -> None:
        self._settings = settings
        self._application = application
        self._produced: Counter[str] = Counter()
        self._latencies_ms: dict[str, list[float]] = {name: [] for name in _SYMBOLS_OF_LANE}

    def play(self, seconds: float, rate_hz: float, seed: int, console: Console) -> DemoReport:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn())  # fmt: skip
        num_events = int(seconds * rate_hz)
        with (
            FeatureSubscriber(self._settings, start="earliest") as subscriber,
            Progress(*columns, console=console) as progress,
        ):
            listener = threading.Thread(target=self._listen, args=(subscriber,), daemon=True)
            listener.start()
            events_in = progress.add_task("events in", total=num_events)
            features_out = progress.add_task("features out", total=num_events)

            def advance(num_produced: int) -> None:
                progress.update(events_in, completed=num_produced)
                progress.update(features_out, completed=self._num_received)

            self._produce(num_events, rate_hz, seed, advance)
            workers = self._settle()
            features = sum(lane.features for lane in total_counts(workers).values())
            progress.update(features_out, completed=self._num_received, total=features)
            subscriber.close()
            listener.join()
        return self._report(workers)

    @property
    def _num_received(self) -> int:
        return sum(map(len, self._latencies_ms.values()))

    def _listen(self, subscriber: FeatureSubscriber) -> None:
        for record in subscriber.records():
            assert record.source_appended_us is not None
            elapsed_us = time.time() * 1e6 - record.source_appended_us
            self._latencies_ms[record.feature.lane].append(elapsed_us / 1000)

    def _produce(
        self, num_events: int, rate_hz: float, seed: int, advance: Callable[[int], None]
    ) -> None:
        """Plays the simulated market in real time, with duplicates and poison mixed in."""
        lanes = [name for name, count in _SYMBOLS_OF_LANE.items() for _ in range(count)]
        lane_of = dict(zip(symbol_names(len(lanes)), lanes, strict=True))
        start_s = time.time()
        events = simulate(
            symbols=list(lane_of),
            seed=seed,
            start_time_us=int(start_s * 1e6),
            rate_hz=rate_hz,
            num_events=num_events,
        )
        with MarketEventProducer(self._settings) as producer:
            for number, event in enumerate(events, 1):
                ahead_s = event.event_time_us / 1e6 - time.time()
                if ahead_s > 0:
                    time.sleep(ahead_s)
                lane = lane_of[event.symbol]
                for _ in range(2 if number % _DUPLICATE_EVERY == 0 else 1):
                    producer.produce(event, lane=lane)
                    self._produced[lane] += 1
                advance(number)
        poisoner = Producer(
            {"bootstrap.servers": self._settings.kafka.bootstrap_servers, "logger": LOGGER}
        )
        for value in _POISON:
            poisoner.produce(self._settings.lane("realtime").topic, value)
            self._produced["realtime"] += 1
        assert poisoner.flush(10) == 0

    def _settle(self) -> list[WorkerStatistics]:
        """Waits until every record has its end and every feature has arrived, or long enough."""
        deadline_s = time.monotonic() + _SETTLE_S
        while True:
            workers = self._application.statistics()
            report = self._report(workers)
            if report.is_complete or time.monotonic() > deadline_s:
                return workers
            time.sleep(_LOOK_EVERY_S)

    def _report(self, workers: list[WorkerStatistics]) -> DemoReport:
        counts = total_counts(workers)
        sizes: Counter[int] = Counter()
        for worker in workers:
            sizes.update(worker.batch_sizes)
        return DemoReport(
            {
                name: LaneReport(
                    self._produced[name],
                    counts[name],
                    len(latencies),
                    _percentiles(latencies),
                )
                for name, latencies in self._latencies_ms.items()
            },
            dict(sorted(sizes.items())),
            workers[0].model_version,
        )


def _percentiles(latencies_ms: list[float]) -> tuple[float, float, float] | None:
    if not latencies_ms:
        return None
    p50, p95, p99 = np.percentile(latencies_ms, [50, 95, 99]).tolist()
    return p50, p95, p99
