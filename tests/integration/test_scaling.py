"""Scaling on the real Kafka and the real Ray Serve: up and down with a step, from zero and to it,
and holding when lag cannot be known.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline import LONG_S, assert_once_and_in_order, features
from ray import serve
from ray.serve.config import AutoscalingPolicy
from typer.testing import CliRunner
from waiting import wait_until

from inference.artifact import Artifact, save_artifact
from inference.model import ModelConfig, Normalisation, build_network
from schemas.settings import Settings
from tapeline.app import ServeApplication, total_counts
from tapeline.autoscale.policy import policy_settings
from tapeline.autoscale.trace import Entry, read, trace_path
from tapeline.cli import app
from tapeline.clients import make_admin
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
NUM_SYMBOLS = 48  # so that no partition has much more than another
NUM_STEPS = 10
WARM_UP = 14 * NUM_SYMBOLS
CALL_S = 0.1  # for 4 windows: 40 a second of one replica
CALM_HZ = 6

pytestmark = [pytest.mark.usefixtures("ray_runtime"), pytest.mark.timeout(400)]


@pytest.fixture
def slow_model(tmp_path: Path) -> Path:
    options = {"num_in": 50, "num_out": 8, "seconds": CALL_S}
    config = ModelConfig(
        architecture="own_models:Slow", options=options, num_features=8, num_steps=NUM_STEPS
    )
    torch.manual_seed(1)
    network = build_network(config, Normalisation([0.0] * 50, [1.0] * 50))
    artifact = Artifact.from_model(
        network, name="slow", version="1", channels_version="market50-v1", card=""
    )
    save_artifact(artifact, tmp_path / "slow")
    return tmp_path / "slow"


class Tape:
    """Events of one market, produced at whatever rate is asked for."""

    def __init__(self, settings: Settings) -> None:
        self._events = simulate(
            symbols=symbol_names(NUM_SYMBOLS), seed=2, start_time_us=10**15, num_events=10**6
        )
        self._producer = MarketEventProducer(settings)
        self._rate_hz = 0.0
        self._ending = threading.Event()
        self._changed = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._by_symbol: Counter[str] = Counter()

    @property
    def num_owed(self) -> int:
        """Features: one for each event with a full window."""
        return sum(max(0, number - NUM_STEPS + 1) for number in self._by_symbol.values())

    def send(self, num_events: int) -> None:
        for _ in range(num_events):
            event = next(self._events)
            self._producer.produce(event, lane="realtime")
            self._by_symbol[event.symbol] += 1

    def play(self, rate_hz: float) -> None:
        """From now on so many a second."""
        self._rate_hz = rate_hz
        if not self._thread.is_alive():
            self._thread.start()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            self.send(1)
            due += 1 / self._rate_hz

    def end(self) -> None:
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join(LONG_S)
        self._producer.flush()
        self._producer.close()


@pytest.fixture
def tape_of() -> Iterator[Callable[[Settings], Tape]]:
    tapes: list[Tape] = []

    def new(settings: Settings) -> Tape:
        tapes.append(Tape(settings))
        return tapes[-1]

    yield new
    for tape in tapes:
        tape.end()


def scaled(make_settings: MakeSettings, slow_model: Path, name: str, **changes: Any) -> Settings:
    others = ("market-data", "batch", "historical", "background")
    autoscale = {
        "enabled": True, "period_s": 1, "stale_after_s": 15, "max_workers": 3, "max_replicas": 4,
        "worker_start_s": 6, "rebalance_s": 1, "replica_start_s": 8, "idle_s": 5,
    }  # fmt: skip
    return make_settings(
        model={"artifact": slow_model, "max_batch": 4, "device": "cpu"},
        window={"num_steps": NUM_STEPS},
        worker={"max_batch": 4, "delivery": "exactly_once"},
        lanes={lane: {"enabled": False} for lane in others},
        kafka={"num_partitions": 6},
        serve={"app_name": name, "worker_num_cpus": 0.2, "model_num_cpus": 0.2},
        autoscale=autoscale | changes,
    )


def entries(settings: Settings, role: str) -> list[Entry]:
    path = trace_path(settings)
    return [one for one in read(path) if one.role == role] if path.exists() else []


def last(settings: Settings, role: str) -> Entry | None:
    return next(iter(reversed(entries(settings, role))), None)


def running(settings: Settings, name: str) -> int:
    status = serve.status().applications[settings.serve.app_name].deployments[name]
    return sum(number for state, number in status.replica_states.items() if state == "RUNNING")


def is_calm(settings: Settings) -> bool:
    """One of each is enough, and no more run."""
    for role, name in (("workers", "worker"), ("replicas", "model")):
        now = last(settings, role)
        if not now or not now.decision or now.decision.target > 1 or now.lanes[0].lag > 40:
            return False
        if running(settings, name) != 1:
            return False
    return True


def explained(settings: Settings) -> dict[str, Any]:
    done = CliRunner().invoke(
        app, ["autoscale", "explain", "--trace", str(trace_path(settings)), "--json"]
    )
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.chaos  # long: replicas start one after another on few cores
def test_a_step_is_followed_up_and_down_and_nothing_is_lost_or_doubled(
    make_settings: MakeSettings, slow_model: Path, tape_of: Callable[[Settings], Tape]
) -> None:
    settings = scaled(make_settings, slow_model, "step")
    ensure_topics(settings)
    application = ServeApplication(settings)
    application.deploy()
    tape = tape_of(settings)

    def counts() -> Any:
        return total_counts(application.statistics())["realtime"]

    try:
        tape.send(WARM_UP)
        wait_until(lambda: counts().features > 10, LONG_S, "windows to be full")
        tape.play(CALM_HZ)
        wait_until(lambda: is_calm(settings), 2 * LONG_S, "a calm start")
        num_looks = len(entries(settings, "replicas"))
        step_s = time.time()
        tape.play(10 * CALM_HZ)

        def up() -> list[Entry]:
            return [
                one
                for one in entries(settings, "replicas")[num_looks:]
                if one.decision and one.decision.target > one.decision.current
            ]

        (first, *_) = wait_until(up, LONG_S, "the step to be answered")
        looks_until = [one for one in entries(settings, "replicas")
                       if step_s <= one.at_s <= first.at_s]  # fmt: skip
        assert len(looks_until) <= 3, "the look that the step began in, and two more"
        wait_until(lambda: running(settings, "model") > 1, 2 * LONG_S, "more replicas to run")

        def is_under_target() -> bool:
            now = last(settings, "replicas")
            return bool(
                now and now.decision
                and now.decision.lag_s < settings.autoscale.drain_target_s
            )  # fmt: skip

        wait_until(is_under_target, LONG_S, "the lag to be under its target")
        assert running(settings, "worker") > 1
        tape.play(CALM_HZ)
        wait_until(lambda: is_calm(settings), 2 * LONG_S, "one of each to be left")
        tape.end()
        told = explained(settings)
        assert told["workers"]["decision"]["target"] == 1
        received = features(settings, tape.num_owed)
        application.drain()
    finally:
        application.delete()
    for role in ("workers", "replicas"):
        since = [one.decision for one in entries(settings, role) if one.at_s >= step_s]
        changes = [one.target - one.current for one in since if one and one.target != one.current]
        signs = [change > 0 for change in changes]
        assert signs == sorted(signs, reverse=True), (role, changes)
        assert signs[0], role
        assert not signs[-1], role
    assert len(received) == tape.num_owed
    assert_once_and_in_order(received)


def test_from_zero_on_lag_alone_and_back_to_zero_in_silence(
    make_settings: MakeSettings, slow_model: Path, tape_of: Callable[[Settings], Tape]
) -> None:
    settings = scaled(make_settings, slow_model, "zero", min_workers=0, min_replicas=0)
    ensure_topics(settings)
    application = ServeApplication(settings)
    application.deploy()
    tape = tape_of(settings)
    try:
        assert running(settings, "worker") == running(settings, "model") == 0
        tape.send(WARM_UP)
        tape.end()
        received = features(settings, tape.num_owed, idle_timeout_s=90)
        assert len(received) == tape.num_owed > 0
        wait_until(
            lambda: running(settings, "worker") == running(settings, "model") == 0,
            2 * LONG_S,
            "silence to end them all",
        )
        decisions = [one.decision for one in entries(settings, "workers") if one.decision]
        assert any("nothing came" in one.why for one in decisions)
        assert explained(settings)["workers"]["decision"]["target"] == 0
    finally:
        application.delete()
    assert_once_and_in_order(received)


@serve.deployment
class Bystander:
    def answer(self) -> int:
        return 42


def test_a_broker_that_cannot_be_asked_holds_the_number_and_harms_nobody(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Unreachable from the start; and a topic that is deleted under a policy at work."""
    good = make_settings(
        serve={"app_name": "deleted"}, state_dir=tmp_path / "good",
        autoscale={"period_s": 0.5, "stale_after_s": 2},
    )  # fmt: skip
    bad = make_settings(
        serve={"app_name": "unreachable"}, state_dir=tmp_path / "bad",
        kafka={"bootstrap_servers": "127.0.0.1:9", "timeout_s": 1},
        autoscale={"period_s": 0.5, "stale_after_s": 2},
    )  # fmt: skip
    ensure_topics(good)
    bystander = serve.run(Bystander.bind(), name="bystander", route_prefix=None)
    try:
        for settings in (good, bad):
            policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
                policy_function="tapeline.autoscale.policy:LagPolicy",
                policy_kwargs={"settings": policy_settings(settings), "role": "workers"},
            )
            scaling = {
                "min_replicas": 1, "initial_replicas": 2, "max_replicas": 4, "policy": policy,
                "downscale_delay_s": 0, "upscale_delay_s": 0,
            }  # fmt: skip
            deployment = Bystander.options(  # type: ignore[attr-defined]
                name="worker", autoscaling_config=scaling, ray_actor_options={"num_cpus": 0.1}
            )
            serve.run(deployment.bind(), name=settings.serve.app_name, route_prefix=None)
        wait_until(lambda: last(good, "workers"), LONG_S, "a look at the lanes")
        admin = make_admin(good)
        for lane in good.active_lanes:
            for done in admin.delete_topics([lane.topic]).values():
                done.result(LONG_S)
        for settings in (good, bad):
            wait_until(
                lambda settings=settings: (one := last(settings, "workers")) and one.held,
                LONG_S,
                f"{settings.serve.app_name} to be held",
            )
        assert "no Kafka broker answers" in explained(bad)["workers"]["held"]
        assert explained(good)["workers"]["held"]
        assert running(bad, "worker") == 2
        held_at = running(good, "worker")
        assert bystander.answer.remote().result(timeout_s=LONG_S) == 42
        assert running(good, "worker") == held_at
    finally:
        for name in ("bystander", "deleted", "unreachable"):
            serve.delete(name)
