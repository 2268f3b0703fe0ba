"""One drill's stage: servers, topics, workers and a load, and what came of it all."""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from waiting import wait_until

from chaos.ledger import Verdict, judge, wait_until_settled
from chaos.load import Load
from chaos.replicas import ServeFleet
from chaos.servers import SESSION_TIMEOUT_MS, Cluster, RedisServer, small_disk
from chaos.workers import Fleet, faked_clock
from inference.artifact import save_artifact
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.errors import ConfigError, TransientError
from schemas.lanes import DEFAULT_LANES
from schemas.settings import Settings, load_settings
from tapeline.lag import lane_lags
from tapeline.topics import ensure_topics

Delivery = Literal["at_least_once", "exactly_once"]
LANES = ("realtime", "market-data", "batch")
LONG_S = 90.0


@dataclass(slots=True)
class Outcome:
    """A drill's row in the table, and why it failed if it did.

    Attributes:
        faults: injected, by kind.
        ends: how workers ended.
        takeovers: partitions taken on at a committed offset.
        repeat_ids: event ids of the repeats.
    """

    drill: str
    seed: int
    delivery: Delivery
    group_protocol: str = ""
    static_membership: bool = False
    faults: dict[str, int] = field(default_factory=dict)
    records: int = 0
    duplicates: int = 0
    poison: int = 0
    features: int = 0
    repeats: int = 0
    repeat_ids: list[str] = field(default_factory=list)
    ends: dict[str, int] = field(default_factory=dict)
    takeovers: int = 0
    seconds: float = 0.0
    judges: str = ""
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.problems


class Ground:
    """What drills share: a broker, a Redis and a small model, each started at first need.

    Each drill has topics, groups and keys of its own. Close it to end the servers.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._servers = ExitStack()
        self._kafka: Cluster | None = None
        self._redis: RedisServer | None = None
        self._num_scenes = 0

    def close(self) -> None:
        self._servers.close()

    @property
    def kafka(self) -> Cluster:
        if self._kafka is None:
            self._kafka = Cluster(self.folder / "kafka", 1)
            self._servers.callback(self._kafka.stop)
            self._kafka.start()
        return self._kafka

    @property
    def redis(self) -> RedisServer:
        if self._redis is None:
            self._redis = RedisServer(self.folder)
            self._servers.callback(self._redis.stop)
            self._redis.start()
        return self._redis

    def artifact(self) -> Path:
        """A model of the usual shape, made small: the drills are about the way there and back."""
        path = self.folder / "model"
        if not path.exists():
            config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1)
            save_artifact(seeded_artifact(config=config), path)
        return path

    def new_folder(self, name: str) -> Path:
        self._num_scenes += 1
        folder = self.folder / f"{self._num_scenes:02d}-{name}"
        folder.mkdir(parents=True)
        return folder


@dataclass(slots=True)
class Scene:
    """A drill under way.

    Attributes:
        chance: the seed's.
        disk: the small disk of node 1, if the drill has one.
        clock: the file that says by how many seconds the workers' clock is off.
        faults: what was broken, by kind.
    """

    settings: Settings
    chance: random.Random
    fleet: Fleet | ServeFleet
    load: Load
    kafka: Cluster
    redis: RedisServer
    disk: Path
    clock: Path
    faults: Counter[str] = field(default_factory=Counter)

    def run_for(self, low_s: float, high_s: float) -> None:
        """A span of the seed's choice goes by."""
        self.fleet.run_for(self.chance.uniform(low_s, high_s))
        self.load.check()

    def committed(self) -> int:
        """Records done, of all lanes; -1 while the broker does not say."""
        try:
            return sum(one.committed or 0 for one in lane_lags(self.settings))
        except (TransientError, ConfigError):
            return -1

    def wait_for_progress(self) -> None:
        """Returns when commits go on: the fault is over for the workers too."""
        before = -1

        def moved() -> bool:
            nonlocal before
            self.fleet.tend()
            self.load.check()
            now = self.committed()
            if before < 0:
                before = now
            return 0 <= before < now

        wait_until(moved, LONG_S, "commits to go on")


Break = Callable[[Scene, int], None]


@dataclass(frozen=True, slots=True)
class Drill:
    """How one kind of fault is made, and under what.

    Attributes:
        breaks: injects ``count`` faults.
        num_nodes: brokers; 1 is the shared one, 3 are the drill's own.
        num_workers: at the start.
        across_lanes: whether some duplicates go to another lane than the first copy.
        small_disk_bytes: node 1 keeps its log on a file system of that size; 0: it does not.
        is_clock_faked: workers are the real command with a clock that can be stepped.
        on_serve: workers and model are a Ray Serve application.
        deliveries: those that can be kept.
    """

    name: str
    breaks: Break
    num_nodes: int = 1
    num_workers: int = 2
    rate_hz: float = 150.0
    across_lanes: bool = True
    worker: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    small_disk_bytes: int = 0
    is_clock_faked: bool = False
    on_serve: bool = False
    deliveries: tuple[Delivery, ...] = ("at_least_once", "exactly_once")


def run_drill(
    drill: Drill, ground: Ground, *, seed: int, count: int, delivery: Delivery
) -> Outcome:
    """Load, faults, rest, ledger. What goes wrong is in the outcome's ``problems``."""
    outcome = Outcome(drill.name, seed, delivery)
    began_s = time.monotonic()
    try:
        with open_scene(drill, ground, seed=seed, delivery=delivery) as scene:
            outcome.group_protocol = scene.settings.worker.group_protocol
            outcome.static_membership = scene.settings.worker.static_membership
            try:
                _play(drill, scene, count, outcome)
            finally:
                outcome.faults = dict(scene.faults)
                outcome.ends = dict(scene.fleet.ends)
                outcome.takeovers = scene.fleet.num_takeovers()
                outcome.problems += scene.fleet.failures
    except Exception as error:
        outcome.problems.append(f"{type(error).__name__}: {error}")
    outcome.seconds = time.monotonic() - began_s
    return outcome


def _play(drill: Drill, scene: Scene, count: int, outcome: Outcome) -> None:
    for slot in range(drill.num_workers):
        scene.fleet.add(slot)
    scene.fleet.wait_until_up()
    scene.load.start()
    scene.wait_for_progress()
    drill.breaks(scene, count)
    intent = scene.load.stop()
    scene.fleet.wait_until_up()
    try:
        wait_until_settled(scene.settings, tend=scene.fleet.tend)
    except TimeoutError as error:
        outcome.problems.append(str(error))  # and what the ledger says all the same
    for slot in scene.fleet.slots:
        scene.fleet.dismiss(slot)
    _note_verdict(outcome, scene, judge(scene.settings, intent))


def _note_verdict(outcome: Outcome, scene: Scene, verdict: Verdict) -> None:
    intent = scene.load.intent
    outcome.records, outcome.duplicates = intent.num_records, intent.num_duplicates
    outcome.poison = len(intent.poison)
    outcome.features, outcome.repeats = verdict.num_features, verdict.num_repeated
    outcome.repeat_ids = verdict.repeats
    outcome.judges = verdict.judges
    outcome.problems += verdict.problems


@contextmanager
def open_scene(drill: Drill, ground: Ground, *, seed: int, delivery: Delivery) -> Iterator[Scene]:
    """Servers, topics and a load that has not begun; no workers yet. Closing ends all of it."""
    chance = random.Random(f"{drill.name}:{seed}:{delivery}")
    folder = ground.new_folder(f"{drill.name}-{delivery}-{seed}")
    disk, clock = folder / "disk", folder / "clock"
    with ExitStack() as cleanup:
        kafka = (
            ground.kafka
            if drill.num_nodes == 1
            else Cluster(
                folder / "kafka",
                drill.num_nodes,
                storages={1: disk / "storage"} if drill.small_disk_bytes else {},
            )
        )
        if drill.small_disk_bytes:
            cleanup.enter_context(small_disk(disk, drill.small_disk_bytes))
        if drill.num_nodes > 1:
            cleanup.callback(kafka.stop)
            kafka.start()
        settings = _settings(drill, ground, folder, kafka, chance, delivery)
        ensure_topics(settings)
        environment = faked_clock(clock) if drill.is_clock_faked else None
        fleet = (
            ServeFleet(settings)
            if drill.on_serve
            else Fleet(settings, folder / "workers", environment=environment)
        )
        cleanup.callback(fleet.close)
        load = Load(settings, seed=seed, rate_hz=drill.rate_hz, across_lanes=drill.across_lanes)
        cleanup.callback(load.abandon)
        yield Scene(settings, chance, fleet, load, kafka, ground.redis, disk, clock)


def _settings(
    drill: Drill,
    ground: Ground,
    folder: Path,
    kafka: Cluster,
    chance: random.Random,
    delivery: Delivery,
) -> Settings:
    unique = folder.name
    membership = {
        "group_protocol": chance.choice(["classic", "consumer"]),
        "static_membership": chance.random() < 0.5,
    }
    lanes: dict[str, dict[str, Any]] = {name: {"enabled": False} for name in DEFAULT_LANES}
    for name in LANES:
        lanes[name] = {
            "topic": f"{unique}.{name}",
            "output_topic": f"{unique}.features.{name}",
            "group": f"{unique}.{name}",
        }
    return load_settings(
        kafka={
            "bootstrap_servers": kafka.bootstrap_servers,
            "num_partitions": 3,
            "replication_factor": kafka.num_nodes,
            "client": {"reconnect.backoff.max.ms": 500},
        },
        redis={
            "url": ground.redis.url,
            "key_prefix": f"{unique}:seen:",
            # A slow answer counts as none, and then a duplicate may pass: not what is tried here.
            "timeout_ms": 5_000,
        },
        model={"artifact": ground.artifact(), "max_batch": 64, **drill.model},
        serve={"app_name": unique, "worker_num_cpus": 0.2, "model_num_cpus": 0.2},
        worker={
            "delivery": delivery,
            "session_timeout_s": SESSION_TIMEOUT_MS / 1000,
            "max_batch": 64,
            **membership,
            **drill.worker,
        },
        lanes=lanes,
        state_dir=folder,
    )
