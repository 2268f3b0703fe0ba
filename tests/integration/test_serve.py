"""Workers and model as two deployments of one application, on the real Ray Serve."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from pipeline import LONG_S, assert_once_and_in_order, features, produce
from waiting import wait_until

from consumers.metrics import LaneCounts
from inference.artifact import save_artifact
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.errors import ConfigError
from schemas.messages import Flags
from schemas.settings import Settings
from tapeline.app import ServeApplication, total_counts
from tapeline.simulator import simulate, symbol_names
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
NUM_EVENTS = 1_200
START_S = 240.0
"""The command imports torch and Serve, and its worker and its replica import them again."""

pytestmark = pytest.mark.usefixtures("ray_runtime")


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1)
    save_artifact(seeded_artifact(config=config), tmp_path / "model")
    return tmp_path / "model"


def test_two_workers_share_the_lanes_and_lose_nothing(
    make_settings: MakeSettings, small_model: Path
) -> None:
    settings = make_settings(
        model={"artifact": small_model},
        serve={"app_name": "two-workers", "num_workers": 2, "worker_num_cpus": 0.2,
               "model_num_cpus": 0.2},
    )  # fmt: skip
    ensure_topics(settings)
    events = list(
        simulate(symbols=symbol_names(8), seed=3, start_time_us=10**15, num_events=NUM_EVENTS)
    )
    application = ServeApplication(settings)
    application.deploy()
    try:
        wait_until(
            lambda: all(one.num_partitions for one in application.statistics()),
            LONG_S,
            "both workers to own partitions",
        )
        tapes = {"realtime": events[::2], "background": events[1::2]}
        for lane, tape in tapes.items():
            assert produce(settings, tape, lane) == NUM_EVENTS // 2

        def ended() -> dict[str, LaneCounts] | None:
            counts = total_counts(application.statistics())
            both = (counts["realtime"], counts["background"])
            done = all(one.records == NUM_EVENTS // 2 and not one.in_flight for one in both)
            return counts if done else None

        counts = wait_until(ended, LONG_S, "every record to have its end")
        received = features(settings, counts["realtime"].features + counts["background"].features)
        assert len(application.drain()) == 2
    finally:
        application.delete()
    for lane, tape in tapes.items():
        warm_up = sum(min(59, times) for times in Counter(one.symbol for one in tape).values())
        assert counts[lane].warm_up == warm_up
        in_lane = [record for record in received if record.feature.lane == lane]
        assert len(in_lane) == counts[lane].features == NUM_EVENTS // 2 - warm_up > 0
    assert_once_and_in_order(received)


def test_an_application_that_cannot_start_says_why(make_settings: MakeSettings) -> None:
    settings = make_settings(
        model={"artifact": Path("/nowhere/model")}, serve={"app_name": "no-model"}
    )
    ensure_topics(settings)
    application = ServeApplication(settings)
    try:
        with pytest.raises(ConfigError, match="/nowhere/model"):
            application.deploy()
    finally:
        application.delete()


def test_the_demo_accounts_for_every_event() -> None:
    """The command itself, on this run's Ray."""
    process = subprocess.run(
        [sys.executable, "-m", "tapeline", "demo", "--seconds", "8", "--rate", "150"],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert process.returncode == 0, process.stderr[-2_000:]
    assert "every event is accounted for" in process.stdout
    assert "stand-in" in process.stderr


def test_run_changes_its_settings_on_sighup_and_ends_on_sigterm(
    make_settings: MakeSettings, small_model: Path, tmp_path: Path
) -> None:
    """``tapeline run`` as a user runs it: started, fed, changed, fed, ended; its table adds up.

    A replica that had been started again would not count what came before.
    """
    settings = make_settings()
    ensure_topics(settings)
    config = tmp_path / "tapeline.toml"
    write_config(config, settings, small_model, deadline_ms=1e9)
    events = list(simulate(symbols=symbol_names(2), seed=5, start_time_us=10**15, num_events=500))
    errors = tmp_path / "run.err"
    with errors.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tapeline", "--config", str(config), "run", "--json"],
            env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address},
            stdout=subprocess.PIPE,
            stderr=output,
        )

    def change(says: str, **changes: object) -> None:
        write_config(config, settings, small_model, **changes)
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: says in errors.read_text(), LONG_S, f"{says!r} in the log")

    try:
        produce(settings, events[:250], "realtime")
        timely = features(settings, 250 - 59 * 2, idle_timeout_s=START_S)
        change("kafka.timeout_s cannot change while workers run", deadline_ms=0.001, timeout_s=20)
        change("settings changed", deadline_ms=0.001)
        produce(settings, events[250:], "realtime")
        late = features(settings, 500 - 59 * 2)[len(timely) :]
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=LONG_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert process.returncode == 0, errors.read_text()[-2_000:]
    assert not any(one.feature.flags & Flags.STALE for one in timely)
    assert len(late) == 250
    assert all(one.feature.flags & Flags.STALE for one in late)
    counts = json.loads(printed)["realtime"]
    assert (counts["records"], counts["features"], counts["warm_up"]) == (500, 382, 118)


def write_config(
    file: Path, settings: Settings, model: Path, *, deadline_ms: object, timeout_s: object = 10
) -> None:
    lane = settings.lane("realtime")
    others = [name for name in settings.lanes if name != "realtime"]
    file.write_text(
        f"""
        [kafka]
        bootstrap_servers = "{settings.kafka.bootstrap_servers}"
        timeout_s = {timeout_s}
        [redis]
        url = "{settings.redis.url}"
        key_prefix = "{settings.redis.key_prefix}"
        [model]
        artifact = "{model}"
        [serve]
        app_name = "run-command"
        worker_num_cpus = 0.2
        model_num_cpus = 0.2
        [lanes.realtime]
        topic = "{lane.topic}"
        output_topic = "{lane.output_topic}"
        group = "{lane.group}"
        deadline_ms = {deadline_ms}
        """
        + "".join(f"[lanes.{name}]\nenabled = false\n" for name in others)
    )
