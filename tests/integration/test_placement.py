"""Worker and model run on the cores that the settings name: in one process, and on Ray Serve."""

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from pipeline import LONG_S, worker_process
from waiting import wait_until

from inference.artifact import save_artifact
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.settings import Settings
from tapeline.app import ServeApplication
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
CORES = sorted(os.sched_getaffinity(0))
PLACED = {"worker": {"cpu_affinity": CORES[:1]}, "model": {"cpu_affinity": CORES[-1:]}}

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="there is one core alone")


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1)
    save_artifact(seeded_artifact(config=config), tmp_path / "model")
    return tmp_path / "model"


Cores = frozenset[int]
WORKERS, MODELS, ALL = frozenset(CORES[:1]), frozenset(CORES[-1:]), frozenset(CORES)


def cores_of(process: psutil.Process) -> tuple[list[Cores], list[Cores]]:
    """Where librdkafka's threads may run, and where each other one of the process."""
    kafka: list[Cores] = []
    others: list[Cores] = []
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            is_kafka = (task / "comm").read_text().startswith("rdk:")
            (kafka if is_kafka else others).append(frozenset(os.sched_getaffinity(int(task.name))))
    return kafka, others


def test_worker_process_runs_where_it_is_told(
    make_settings: MakeSettings, small_model: Path, tmp_path: Path
) -> None:
    settings = make_settings(**PLACED)
    ensure_topics(settings)
    log = tmp_path / "worker.log"
    with worker_process(settings, small_model, log) as process:
        wait_until(lambda: "partition_assigned" in log.read_text(), LONG_S, "a worker that works")
        kafka, others = cores_of(psutil.Process(process.pid))
    assert len(kafka) > 10
    assert set(kafka) == {WORKERS}
    assert set(others) == {WORKERS, MODELS}
    assert others.count(MODELS) == 1, "the engine's thread"


@pytest.mark.usefixtures("ray_runtime")
def test_replicas_run_where_they_are_told(make_settings: MakeSettings, small_model: Path) -> None:
    settings = make_settings(
        worker=PLACED["worker"],
        model={**PLACED["model"], "artifact": small_model},
        serve={"app_name": "placed", "worker_num_cpus": 0.2, "model_num_cpus": 0.2},
    )
    ensure_topics(settings)
    application = ServeApplication(settings)
    application.deploy()
    try:
        replicas = {
            kind: process
            for process in psutil.process_iter()
            for kind in ("worker", "model")
            if f"ServeReplica:placed:{kind}" in " ".join(process.cmdline())
        }
        wait_until(lambda: cores_of(replicas["worker"])[0], LONG_S, "a worker that works")
        kafka, _ = cores_of(replicas["worker"])
        assert set(kafka) == {WORKERS}
        _, others = cores_of(replicas["model"])
        assert set(others) == {MODELS, ALL}
        assert others.count(MODELS) == 1, "the engine's thread; Ray's own stay where they are"
    finally:
        application.delete()
