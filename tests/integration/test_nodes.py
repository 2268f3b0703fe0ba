"""A node of a Ray cluster dies under load: its partitions and replicas are back elsewhere."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from nodes import ray_nodes
from pipeline import LONG_S, assert_once_and_in_order, features
from waiting import wait_until

from inference.artifact import save_artifact
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.settings import Settings, as_environment
from tapeline.lag import lane_lags
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
NUM_SYMBOLS = 24
NUM_EVENTS = 60 * NUM_SYMBOLS + 3_000
RATE_HZ = 200


@pytest.mark.chaos  # long: a cluster of its own
@pytest.mark.timeout(400)
def test_a_killed_node_loses_nothing(
    make_settings: MakeSettings, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    config = ModelConfig(conv_channels=(8,), lstm_hidden=16, lstm_layers=1, num_features=8)
    save_artifact(seeded_artifact(config=config), tmp_path / "model")
    with ray_nodes(2, tmp_path / "nodes.log") as nodes:
        settings = make_settings(
            model={"artifact": tmp_path / "model", "device": "cpu", "max_batch": 32,
                   "num_replicas": 2},
            serve={"address": nodes.address, "num_workers": 2, "worker_num_cpus": 0.45,
                   "model_num_cpus": 0.45},
            worker={"delivery": "exactly_once", "retry_deadline_s": 60},
            kafka={"num_partitions": 4},
        )  # fmt: skip
        ensure_topics(settings)
        errors = tmp_path / "run.err"
        with errors.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tapeline", "run", "--json"],
                env=os.environ | as_environment(settings),
                stdout=subprocess.PIPE,
                stderr=output,
            )
        try:
            wait_until(
                lambda: process.poll() is not None or "running on Ray" in errors.read_text(),
                2 * LONG_S,
                "the application to run",
            )
            assert process.poll() is None, errors.read_text()[-2_000:]
            victim = max(nodes.raylets, key=lambda raylet: len(nodes.replicas(raylet)))
            (survivor,) = set(nodes.raylets) - {victim}
            hit = nodes.replicas(victim)
            assert any(":worker" in one for one in hit), "a worker to lose"
            killed_s = _produce(settings, lambda: nodes.kill(victim))
            wait_until(lambda: len(nodes.replicas(survivor)) == 4, 2 * LONG_S, "all four to run")
            back_s = time.time() - killed_s
            expected = NUM_EVENTS - 59 * NUM_SYMBOLS
            received = features(settings, expected, idle_timeout_s=90)
            wait_until(
                lambda: not sum(one.lag for one in lane_lags(settings)), LONG_S, "all committed"
            )
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=2 * LONG_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    assert process.returncode == 0, errors.read_text()[-2_000:]
    assert json.loads(printed)["realtime"]["dead_letters"] == 0
    assert len(received) == expected
    assert_once_and_in_order(received)
    moments = sorted(one.appended_us / 1e6 for one in received)
    silence_s = max(later - now for now, later in pairwise(moments))
    record_property("replicas_back_s", round(back_s, 1))
    record_property("longest_silence_s", round(silence_s, 1))
    print(f"killed {len(hit)} replicas; back after {back_s:.1f} s; silence {silence_s:.1f} s")


def _produce(settings: Settings, kill: Callable[[], None]) -> float:
    """All events, the last 3,000 at a steady rate; the node dies at their first third. When it did.

    Symbols take turns, so that all of them have full windows by then.
    """
    streams = [
        list(
            simulate(symbols=[symbol], seed=4, start_time_us=10**15,
                     num_events=NUM_EVENTS // NUM_SYMBOLS)
        )
        for symbol in symbol_names(NUM_SYMBOLS)
    ]  # fmt: skip
    events = [event for events in zip(*streams, strict=True) for event in events]
    assert len(events) == NUM_EVENTS
    killed_s = 0.0
    with MarketEventProducer(settings) as producer:
        begun_s = time.monotonic()
        for number, event in enumerate(events):
            steady = number - (NUM_EVENTS - 3_000)
            if steady == 0:
                begun_s = time.monotonic()
            if steady == 1_000:
                kill()
                killed_s = time.time()
            if steady > 0:
                time.sleep(max(0.0, begun_s + steady / RATE_HZ - time.monotonic()))
            producer.produce(event, lane="realtime")
        producer.flush()
    return killed_s
