"""A worker against the real broker, as tests drive it, and what came out of it."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry
from waiting import wait_until

from consumers.dedup import open_first_seen
from consumers.identity import claimed_name
from consumers.metrics import LaneCounts, WorkerStatistics
from consumers.tracing import open_tracing
from consumers.worker import Worker
from inference.client import Inferencer, LocalInferencer
from inference.engine import Engine
from inference.hosted import HostedModels
from schemas.messages import MarketEvent
from schemas.settings import Settings, as_environment
from tapeline.lag import lane_lags
from tapeline.producer import MarketEventProducer
from tapeline.subscriber import FeatureRecord, FeatureSubscriber
from tapeline.topics import ensure_topics

LONG_S = 120.0  # a busy machine stood still for a minute, twice


class RunningWorker:
    """A worker on an event loop in a thread of its own."""

    def __init__(self, settings: Settings, inferencer: Inferencer) -> None:
        self._settings = settings
        self._inferencer = inferencer
        self._worker: Worker | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        wait_until(lambda: self._worker or self._error, LONG_S, "the worker to be built")

    async def _run(self) -> None:
        first_seen = await open_first_seen(self._settings.redis)
        try:
            self._loop = asyncio.get_running_loop()
            registry = CollectorRegistry()
            with claimed_name(self._settings) as name:
                self._worker = Worker(
                    self._settings,
                    self._inferencer,
                    first_seen,
                    instance_id=name,
                    tracing=open_tracing(self._settings.tracing),
                    registry=registry,
                )
                await self._worker.run()
        except BaseException as error:
            self._error = error
        finally:
            await self._inferencer.close()
            await first_seen.close()

    def statistics(self) -> WorkerStatistics:
        assert self._worker is not None
        return self._worker.statistics()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def last_statistics(self) -> WorkerStatistics:
        """Of a worker that has ended, however it did."""
        assert self._worker is not None
        assert not self.is_alive
        return self._worker.statistics()

    def configure(self, settings: Settings) -> None:
        """Other live settings, from the next micro-batch on."""

        async def take() -> None:
            assert self._worker is not None
            self._worker.configure(settings)

        asyncio.run_coroutine_threadsafe(take(), self._loop).result(LONG_S)

    def check_health(self) -> None:
        assert self._worker is not None
        self._worker.check_health()

    def wait_until_ended(self, lane: str, num_records: int) -> LaneCounts:
        """The lane's counts, once so many records have their end."""

        def ended() -> LaneCounts | None:
            if self._error:
                raise self._error
            counts = self.statistics().lanes[lane]
            return counts if counts.records >= num_records and not counts.in_flight else None

        try:
            return wait_until(ended, LONG_S, f"{num_records} records of lane {lane}")
        except TimeoutError as error:
            error.add_note(f"it is at {self.statistics()}")
            for lag in lane_lags(self._settings, [self._settings.lane(lane)]):
                error.add_note(str(lag))
            raise

    def stop(self) -> WorkerStatistics:
        """Stops it in order; raises what it ended with."""
        assert self._worker is not None
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._worker.stop)
        return self.join()

    def join(self) -> WorkerStatistics:
        """Waits until it has ended; raises what it ended with."""
        assert self._worker is not None
        self._thread.join(LONG_S)
        assert not self._thread.is_alive()
        if self._error:
            raise self._error
        return self._worker.statistics()


@contextmanager
def running_worker(
    settings: Settings, engine: Engine, inferencer: Inferencer | None = None
) -> Iterator[RunningWorker]:
    """A worker with that engine, or with an ``inferencer`` around it; stopped in order."""
    ensure_topics(settings)
    worker = RunningWorker(settings, inferencer or local(engine))
    try:
        yield worker
    finally:
        worker.stop()


def local(engine: Engine) -> LocalInferencer:
    return LocalInferencer(HostedModels(engine))


@contextmanager
def worker_process(settings: Settings, artifact: Path, log: Path) -> Iterator[subprocess.Popen]:
    """``tapeline worker`` with these settings; whatever is left of it is killed at the end.

    Its stdout, the counts as JSON, is a pipe; its log goes to ``log``.
    """
    model = settings.model.model_copy(update={"artifact": artifact})
    environment = as_environment(settings.model_copy(update={"model": model}))
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tapeline", "worker", "--json"],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=LONG_S)


def produce(settings: Settings, events: Iterable[MarketEvent], lane: str) -> int:
    """Produces and flushes; returns how many."""
    with MarketEventProducer(settings) as producer:
        for event in events:
            producer.produce(event, lane=lane)
        producer.flush()
        return producer.statistics().num_acknowledged


def features(
    settings: Settings, limit: int | None = None, idle_timeout_s: float | None = None
) -> list[FeatureRecord]:
    """``limit`` of what is on the output topics, no fewer; or all, until nothing comes."""
    if idle_timeout_s is None:
        idle_timeout_s = 3 if limit is None else LONG_S
    with FeatureSubscriber(
        settings, start="earliest", limit=limit, idle_timeout_s=idle_timeout_s
    ) as subscriber:
        received = list(subscriber.records())
    assert limit is None or len(received) == limit, f"{len(received)} of {limit} features came"
    return received


def assert_once_and_in_order(records: Iterable[FeatureRecord]) -> None:
    """No event twice; per lane, venue and symbol in the order of the source's offsets."""
    ids = Counter(record.feature.event_id for record in records)
    assert not [event_id for event_id, times in ids.items() if times > 1]
    newest: dict[tuple[str, str, str], int] = {}
    for record in records:
        feature = record.feature
        key = (feature.lane, feature.venue, feature.symbol)
        assert feature.source_offset > newest.get(key, -1), key
        newest[key] = feature.source_offset
