"""Every drill, shortly: one fault or a few. `make chaos` runs them long."""

from collections.abc import Iterator
from typing import get_args

import pytest

from chaos.drills import DRILLS
from chaos.scene import Delivery, Ground, run_drill

SEED = 1
DELIVERIES: tuple[Delivery, ...] = get_args(Delivery)
SHORT = {"worker-kill": 2, "worker-scale": 2, "redis-empty": 1}
LONG = [
    (name, delivery)
    for name, drill in DRILLS.items()
    for delivery in drill.deliveries
    if name not in SHORT
]


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    ground = Ground(tmp_path_factory.mktemp("chaos"))
    yield ground
    ground.close()


@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize("name", SHORT)
def test_the_ledger_holds(ground: Ground, name: str, delivery: Delivery) -> None:
    _hold(ground, name, delivery, SHORT[name])


@pytest.mark.chaos
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("name", "delivery"), LONG)
def test_the_ledger_holds_in_a_long_drill(ground: Ground, name: str, delivery: Delivery) -> None:
    _hold(ground, name, delivery, count=2)


def _hold(ground: Ground, name: str, delivery: Delivery, count: int) -> None:
    outcome = run_drill(DRILLS[name], ground, seed=SEED, count=count, delivery=delivery)
    assert outcome.is_good, "\n".join(outcome.problems)
    assert sum(outcome.faults.values()) == count
    assert outcome.duplicates, "the load had duplicates in it"
