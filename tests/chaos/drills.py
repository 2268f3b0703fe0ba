"""The drills: each a kind of fault, injected ``count`` times under load."""

import contextlib
import signal
from pathlib import Path

from waiting import wait_until

from chaos.replicas import ServeFleet
from chaos.scene import Drill, Scene
from chaos.servers import LONG_S
from chaos.workers import Fleet


def _kill_workers(scene: Scene, count: int) -> None:
    """kill -9 of a worker at random moments."""
    assert isinstance(scene.fleet, Fleet)
    for _ in range(count):
        scene.run_for(0.2, 3.0)
        victim = scene.fleet.victim(scene.chance)
        scene.run_for(0.0, 0.5)  # it may just have come up: not every kill hits a fresh one
        victim.send(signal.SIGKILL)
        wait_until(lambda: victim.exit_code is not None, LONG_S, "a killed worker to be gone")  # noqa: B023
        scene.faults["kill -9 of a worker"] += 1


def _restart_brokers(scene: Scene, count: int) -> None:
    """kill -9 or SIGTERM of a broker, which stays away for a moment."""
    for _ in range(count):
        scene.run_for(0.5, 3.0)
        node = scene.chance.choice(list(scene.kafka.nodes.values()))
        if scene.chance.random() < 0.5:
            node.kill()
            scene.faults["kill -9 of the broker"] += 1
        else:
            node.terminate()
            scene.faults["SIGTERM of the broker"] += 1
        scene.run_for(0.0, 3.0)
        node.start()
        scene.wait_for_progress()
        if scene.kafka.num_nodes > 1:
            scene.kafka.wait_until_in_sync()


def _kill_leaders(scene: Scene, count: int) -> None:
    """kill -9 of the node that leads a partition of an input topic, of three nodes."""
    for _ in range(count):
        scene.run_for(0.5, 3.0)
        lane = scene.chance.choice(scene.settings.active_lanes)
        leader = scene.kafka.leader(
            lane.topic, scene.chance.randrange(scene.settings.kafka.num_partitions)
        )
        scene.kafka.nodes[leader].kill()
        scene.faults["kill -9 of a leader"] += 1
        scene.wait_for_progress()  # on the other two
        scene.kafka.nodes[leader].start()
        scene.kafka.wait_until_in_sync()


def _pause_workers(scene: Scene, count: int) -> None:
    """SIGSTOP past the session; another takes over; SIGCONT of a zombie."""
    assert isinstance(scene.fleet, Fleet)
    session_s = scene.settings.worker.session_timeout_s
    for _ in range(count):
        scene.run_for(0.5, 3.0)
        zombie = scene.fleet.victim(scene.chance)
        zombie.send(signal.SIGSTOP)
        scene.run_for(session_s + 0.5, session_s + 3.0)
        scene.wait_for_progress()
        zombie.send(signal.SIGCONT)
        scene.faults["SIGSTOP past the session"] += 1
        scene.wait_for_progress()


def _empty_redis(scene: Scene, count: int) -> None:
    """FLUSHALL, or kill -9 with the append-only file deleted, for a moment."""
    import redis

    for _ in range(count):
        scene.run_for(0.5, 3.0)
        if scene.chance.random() < 0.3:
            with redis.Redis.from_url(scene.redis.url) as client:
                client.flushall()
            scene.faults["FLUSHALL of Redis"] += 1
        else:
            scene.redis.kill()
            scene.redis.forget()
            scene.run_for(0.0, 4.0)
            scene.redis.start()
            scene.faults["Redis killed and emptied"] += 1
        scene.wait_for_progress()


def _scale_workers(scene: Scene, count: int) -> None:
    """A worker more, a worker less, by SIGTERM, every few seconds."""
    for _ in range(count):
        scene.run_for(0.5, 3.0)
        slots = scene.fleet.slots
        if len(slots) < 2 or (len(slots) < 4 and scene.chance.random() < 0.5):
            scene.fleet.add(next(slot for slot in range(5) if slot not in slots))
            scene.faults["worker added"] += 1
        else:
            scene.fleet.dismiss(scene.chance.choice(slots))
            scene.faults["worker removed"] += 1


def _fill_disk(scene: Scene, count: int) -> None:
    """A broker's disk is full: it fails, its disk is freed, it comes back."""
    node = scene.kafka.nodes[1]
    ballast = scene.disk / "ballast"
    for _ in range(count):
        scene.run_for(0.5, 3.0)
        _fill(ballast)
        wait_until(
            lambda: scene.fleet.tend() or not node.is_running, LONG_S, "the full broker to give up"
        )
        scene.faults["disk of a broker full"] += 1
        scene.wait_for_progress()  # on the other two
        ballast.unlink()
        node.start()
        scene.kafka.wait_until_in_sync()


def _fill(ballast: Path) -> None:
    """Takes every byte that the file system still has."""
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


def _step_clock(scene: Scene, count: int) -> None:
    """The workers' wall clock steps by minutes, forth and back."""
    for _ in range(count):
        scene.run_for(0.5, 3.0)
        minutes = scene.chance.choice([-1, 1]) * scene.chance.uniform(1, 30)
        draft = scene.clock.with_suffix(".new")
        draft.write_text(f"{minutes * 60:.3f}")
        draft.replace(scene.clock)  # the worker reads the old step or the new one
        scene.faults["clock step"] += 1
        scene.wait_for_progress()


def _kill_models(scene: Scene, count: int) -> None:
    """kill -9 of a model replica on Ray Serve, under a load that keeps the model busy."""
    assert isinstance(scene.fleet, ServeFleet)
    for _ in range(count):
        scene.run_for(0.5, 3.0)
        scene.fleet.kill_model(scene.chance)
        scene.faults["kill -9 of a model replica"] += 1
        scene.wait_for_progress()


DRILLS = {
    drill.name: drill
    for drill in (
        Drill("worker-kill", _kill_workers),
        Drill("worker-pause", _pause_workers),
        Drill("worker-scale", _scale_workers),
        # A duplicate is known to the shared table, or to a worker that saw the first copy itself.
        # With the table emptied only the second is left: copies stay in their lane, hence with
        # their worker, which lives through the drill.
        Drill("redis-empty", _empty_redis, across_lanes=False),
        Drill("broker-restart", _restart_brokers, num_nodes=3),
        # A lone broker that restarts may itself lose the marker that aborts a transaction, and
        # commit its records with the next one of that producer (docs/reliability.md).
        Drill("lone-broker-restart", _restart_brokers, deliveries=("at_least_once",)),
        Drill("leader-kill", _kill_leaders, num_nodes=3),
        Drill("disk-full", _fill_disk, num_nodes=3, small_disk_bytes=256 * 2**20),
        Drill("clock-step", _step_clock, is_clock_faked=True, num_workers=1),
        # The usual model, not the small one: a kill at any moment finds it at work.
        Drill(
            "model-kill",
            _kill_models,
            on_serve=True,
            rate_hz=300,
            model={"artifact": None, "num_replicas": 2},
        ),
    )
}
