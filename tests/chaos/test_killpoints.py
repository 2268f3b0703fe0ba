"""A worker dies at every boundary of the way of an event, once each, and the ledger holds."""

import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from typing import get_args

import pytest

from chaos.killpoints import Boundary, KillPoint, Side, TracedWorker, boundaries
from chaos.ledger import judge, wait_until_settled
from chaos.scene import Delivery, Drill, Ground, Scene, open_scene

LONG_S = 60.0
DELIVERIES: tuple[Delivery, ...] = get_args(Delivery)
_OUTLETS = {"publisher.py", "transactions.py"}  # each is of one delivery alone
Met = Counter[tuple[Boundary, Side]]
_MAX_BEFORE = 4  # times that a boundary is passed before it kills
_OFTEN = 20  # met so often in the census, it is met soon again
# Without these among the points met, the census has not seen the way of an event.
_ESSENTIAL = {
    "at_least_once": {"_step", "_finish", "prepare", "try_produce", "_commit", "_run", "revoked"},
    "exactly_once": {"_step", "_finish", "prepare", "_transact", "_open", "_run", "revoked"},
}


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    ground = Ground(tmp_path_factory.mktemp("killpoints"))
    yield ground
    ground.close()


def test_boundaries_are_found_in_the_code() -> None:
    functions = {one.function for one in boundaries()}
    assert functions >= _ESSENTIAL["at_least_once"] | _ESSENTIAL["exactly_once"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_worker_may_die_at_every_boundary(ground: Ground, delivery: Delivery) -> None:
    """Each kills once: boundaries that both deliveries pass are dealt out between them, and the
    sides among the boundaries.
    """
    _die_everywhere(ground, delivery, _is_dealt_to)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("delivery", DELIVERIES)
def test_a_worker_may_die_at_every_boundary_in_each(ground: Ground, delivery: Delivery) -> None:
    _die_everywhere(ground, delivery, lambda *_: True)


def _is_dealt_to(delivery: Delivery, boundary: Boundary, side: Side) -> bool:
    turn = boundaries().index(boundary)
    is_mine = boundary.file in _OUTLETS or DELIVERIES[turn % len(DELIVERIES)] == delivery
    return is_mine and side == ("before", "after")[turn // len(DELIVERIES) % 2]


def _die_everywhere(
    ground: Ground, delivery: Delivery, is_wanted: Callable[[Delivery, Boundary, Side], bool]
) -> None:
    """One worker after another under one load, each killed at one point; one ledger at the end."""
    # A static member: the next worker has the partitions at once, without a session's wait.
    membership = {"group_protocol": "classic", "static_membership": True, "instance_id": "one"}
    drill = Drill("kill-points", lambda scene, count: None, rate_hz=200, worker=membership)
    with open_scene(drill, ground, seed=1, delivery=delivery) as scene:
        scene.load.start()
        running, stopping = _census(scene)
        functions = {boundary.function for boundary, _ in running | stopping}
        assert functions >= _ESSENTIAL[delivery]
        chance = random.Random(1)
        missed = []
        points = [one for one in sorted(running | stopping) if is_wanted(delivery, *one)]
        for boundary, side in points:
            times = running[boundary, side]
            # What is met once in a start is met once by everyone; the rest, under load.
            passed = chance.randrange(_MAX_BEFORE) if times > _OFTEN else 0
            point = KillPoint(boundary, side, passed)
            if not _dies_at(scene, point, at_stop=not times):
                missed.append(point)
        intent = scene.load.stop()
        scene.fleet.add(0)
        wait_until_settled(scene.settings, tend=scene.fleet.tend)
        scene.fleet.dismiss(0)
        verdict = judge(scene.settings, intent)
    assert verdict.is_clean, "\n".join(verdict.problems)
    # A boundary is met once or not at all in a run where timing decides, as in a full queue.
    assert len(missed) <= len(points) // 10, "\n".join(map(str, missed))
    assert not scene.fleet.failures


def _census(scene: Scene) -> tuple[Met, Met]:
    """The points that a worker meets while it runs, and those that it meets only as it stops."""
    worker = TracedWorker(scene.settings, scene.settings.state_dir / "census")
    scene.wait_for_progress()
    scene.run_for(2, 2)
    running = worker.met()
    worker.send(signal.SIGTERM)
    assert worker.join(LONG_S) == 0, worker.log.read_text()
    return running, worker.met() - running


def _dies_at(scene: Scene, point: KillPoint, *, at_stop: bool) -> bool:
    """Starts a worker that shall die there; whether it did. One that did not ends in order."""
    name = f"kill-{point.boundary.file[:-3]}-{point.boundary.line}-{point.side}"
    worker = TracedWorker(scene.settings, scene.settings.state_dir / name, point)
    if at_stop:
        scene.wait_for_progress()
    elif worker.join(10) is not None:
        assert worker.exit_code == -signal.SIGKILL, worker.log.read_text()
        return True
    worker.send(signal.SIGTERM)
    assert worker.join(LONG_S) in (0, -signal.SIGKILL), worker.log.read_text()
    return worker.exit_code == -signal.SIGKILL
