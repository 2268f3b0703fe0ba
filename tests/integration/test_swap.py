"""Another model version while events flow: nothing fails, nothing is lost, no partition goes back.

Real Kafka and Redis; once with the model in the worker's process, once on the real Ray Serve.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pipeline import LONG_S, RunningWorker, assert_once_and_in_order, features
from typer.testing import CliRunner
from waiting import wait_until

from inference.artifact import save_artifact
from inference.client import LocalInferencer
from inference.hosted import host_models
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from inference.store import ModelStore
from schemas.settings import Settings
from tapeline.app import ServeApplication, total_counts
from tapeline.cli import app
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.subscriber import FeatureRecord
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
NUM_SYMBOLS = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = ModelConfig(conv_channels=(8,), lstm_hidden=16, lstm_layers=1, num_features=8)


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """Three versions; the first serves."""
    store = ModelStore(tmp_path / "models")
    for seed in (1, 2, 3):
        artifact = seeded_artifact(seed=seed, config=SMALL)
        save_artifact(artifact, store.path / artifact.model_version)
    command(store, "promote", store.versions()[0])
    return store


def command(store: ModelStore, *words: str) -> str:
    """``tapeline model ...`` as a user types it, beside the running workers."""
    environment = {"TAPELINE_MODEL__STORE": str(store.path)}
    done = CliRunner().invoke(app, ["model", *words], env=environment)
    assert done.exit_code == 0, done.output
    return done.output


class Flow:
    """Events that keep coming until they are told to stop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._produce)
        self.num_sent = 0

    def _produce(self) -> None:
        events = simulate(
            symbols=symbol_names(NUM_SYMBOLS), seed=1, start_time_us=10**15, num_events=10**6
        )
        with MarketEventProducer(self._settings) as producer:
            for event in events:
                producer.produce(event, lane="realtime")
                self.num_sent += 1
                if self._ending.wait(0.002):  # about 400 a second
                    break
            producer.flush()

    def end(self) -> int:
        """How many were sent."""
        self._ending.set()
        self._thread.join(LONG_S)
        assert not self._thread.is_alive()
        return self.num_sent

    def __enter__(self) -> "Flow":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


@contextmanager
def worker_of(settings: Settings) -> Iterator[RunningWorker]:
    ensure_topics(settings)
    worker = RunningWorker(settings, LocalInferencer(host_models(settings.model, settings.window)))
    try:
        yield worker
    finally:
        worker.stop()


def versions_by_partition(records: list[FeatureRecord]) -> dict[int, list[str]]:
    """The versions of each partition's features, in order, each run of one version once."""
    runs: dict[int, list[str]] = defaultdict(list)
    for record in sorted(records, key=lambda one: (one.partition, one.offset)):
        versions = runs[record.partition]
        if not versions or versions[-1] != record.feature.model_version:
            versions.append(record.feature.model_version)
    return runs


def is_within(run: list[str], whole: list[str]) -> bool:
    """In its order. A partition without a feature meanwhile leaves a version out."""
    remaining = iter(whole)
    return all(version in remaining for version in run)


def wait_for_more(worker: RunningWorker, num_features: int = 300) -> None:
    start = worker.statistics().lanes["realtime"].features
    wait_until(
        lambda: worker.statistics().lanes["realtime"].features >= start + num_features,
        LONG_S,
        f"{num_features} more features",
    )


def test_versions_change_under_load_once_a_partition(
    make_settings: MakeSettings, store: ModelStore
) -> None:
    one, two, three = store.versions()
    settings = make_settings(
        model={"store": store.path, "max_batch": 32, "device": DEVICE}, kafka={"num_partitions": 4}
    )
    with worker_of(settings) as worker, Flow(settings) as flow:
        wait_for_more(worker)
        for version in (two, three):
            command(store, "promote", version)
            wait_until(
                lambda version=version: worker.statistics().model_version == version,
                LONG_S,
                f"{version} to serve",
            )
            wait_for_more(worker)
        command(store, "rollback")
        wait_until(lambda: worker.statistics().model_version == two, LONG_S, "the way back")
        wait_for_more(worker)
        num_sent = flow.end()
        counts = worker.wait_until_ended("realtime", num_sent)
        statistics = worker.statistics()
    assert counts.dead_letters == counts.abandoned == 0
    assert statistics.rollout.num_changes == 3
    assert statistics.rollout.num_refused == 0
    received = features(settings, counts.features)
    assert len(received) == counts.features == num_sent - counts.warm_up
    assert_once_and_in_order(received)
    runs = versions_by_partition(received)
    assert len(runs) == 4
    assert all(is_within(run, [one, two, three, two]) for run in runs.values()), runs
    assert [one, two, three, two] in runs.values()


def test_canary_and_shadow_under_load(make_settings: MakeSettings, store: ModelStore) -> None:
    """A canary makes its symbols' features, and no others; a shadow makes none."""
    one, two, three = store.versions()
    settings = make_settings(model={"store": store.path, "max_batch": 32, "device": DEVICE})
    with worker_of(settings) as worker, Flow(settings) as flow:
        wait_for_more(worker)
        command(store, "promote", two, "--canary", "0.5")
        command(store, "promote", three, "--shadow")
        assert "canary, 50% of symbols" in command(store, "ls")
        wait_until(
            lambda: worker.statistics().shadow.num_windows > 50, LONG_S, "the shadow to compare"
        )
        wait_for_more(worker)
        shadow = worker.statistics().shadow
        num_sent = flow.end()
        counts = worker.wait_until_ended("realtime", num_sent)
    assert shadow.model_version == three
    assert shadow.num_failed == 0
    assert shadow.seconds > 0
    assert shadow.max_difference > shadow.sum_difference / shadow.num_windows > 0
    received = features(settings, counts.features)
    assert len(received) == counts.features == num_sent - counts.warm_up
    assert_once_and_in_order(received)
    rollout = store.rollout()
    runs: dict[tuple[str, str], list[str]] = defaultdict(list)
    for record in received:
        symbol = (record.feature.venue, record.feature.symbol)
        if not runs[symbol] or runs[symbol][-1] != record.feature.model_version:
            runs[symbol].append(record.feature.model_version)
    assert len(runs) == NUM_SYMBOLS
    for symbol, versions in runs.items():
        # A symbol whose window was not full before has none of the first version's.
        allowed = [[one, two], [two]] if rollout.version_of(*symbol) == two else [[one]]
        assert versions in allowed, symbol
    assert [one, two] in runs.values()


def test_a_version_that_does_not_hold_here_is_refused_and_all_goes_on(
    make_settings: MakeSettings, store: ModelStore
) -> None:
    """Its reference outputs are another model's: what a device that rounds wildly looks like."""
    one, *_ = store.versions()
    good = seeded_artifact(seed=9, config=SMALL)
    reference = good.reference
    object.__setattr__(reference, "features", reference.features + np.float32(1))
    save_artifact(good, store.path / good.model_version)
    settings = make_settings(model={"store": store.path, "max_batch": 32, "device": DEVICE})
    with worker_of(settings) as worker, Flow(settings) as flow:
        wait_for_more(worker)
        command(store, "promote", good.model_version)
        wait_until(lambda: worker.statistics().rollout.num_refused, LONG_S, "the refusal")
        wait_for_more(worker)
        counts = worker.wait_until_ended("realtime", flow.end())
        assert worker.statistics().model_version == one
    assert counts.dead_letters == 0
    assert {record.feature.model_version for record in features(settings, counts.features)} == {one}


@pytest.mark.usefixtures("ray_runtime")
def test_two_workers_and_two_replicas_change_over_on_serve(
    make_settings: MakeSettings, store: ModelStore
) -> None:
    one, two, _ = store.versions()
    settings = make_settings(
        model={"store": store.path, "max_batch": 32, "device": DEVICE, "num_replicas": 2},
        kafka={"num_partitions": 2},
        serve={"app_name": "swap", "num_workers": 2, "worker_num_cpus": 0.2,
               "model_num_cpus": 0.2, "model_num_gpus": 0.25 if DEVICE == "cuda" else 0},
    )  # fmt: skip
    ensure_topics(settings)
    application = ServeApplication(settings)
    application.deploy()
    try:
        wait_until(
            lambda: all(worker.num_partitions for worker in application.statistics()),
            LONG_S,
            "both workers to own partitions",
        )
        with Flow(settings) as flow:

            def more(num_features: int) -> None:
                start = total_counts(application.statistics())["realtime"].features
                wait_until(
                    lambda: (
                        total_counts(application.statistics())["realtime"].features
                        >= start + num_features
                    ),
                    LONG_S,
                    f"{num_features} more features",
                )

            more(300)
            command(store, "promote", two)
            wait_until(
                lambda: {worker.model_version for worker in application.statistics()} == {two},
                LONG_S,
                "both workers to change over",
            )
            more(300)
            num_sent = flow.end()

        def ended() -> int | None:
            counts = total_counts(application.statistics())["realtime"]
            assert counts.dead_letters == 0
            is_done = counts.records == num_sent and not counts.in_flight
            return counts.features if is_done else None

        num_features = wait_until(ended, LONG_S, "every record to have its end")
        application.drain()
    finally:
        application.delete()
    received = features(settings, num_features)
    assert len(received) == num_features
    assert_once_and_in_order(received)
    assert set(map(tuple, versions_by_partition(received).values())) == {(one, two)}
