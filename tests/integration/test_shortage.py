"""A worker that is short of a resource, on the real Kafka: it steps back, and no lane starves."""

from collections.abc import Callable

import pytest
from pipeline import LONG_S, RunningWorker, assert_once_and_in_order, features, running_worker
from waiting import wait_until

from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.messages import MarketEvent
from schemas.settings import Settings
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names

MakeSettings = Callable[..., Settings]
ALWAYS_SHORT = {"memory_target": 0.001, "memory_max": 0.002, "hysteresis": 0.0005}
HELD = ("background", "historical", "batch", "market-data")
NUM_SYMBOLS = 5
WARM_UP = 59 * NUM_SYMBOLS


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1)
    return Engine(seeded_artifact(config=config), device="cpu", max_batch=64)


def tape(num_events: int, seed: int) -> list[MarketEvent]:
    symbols = symbol_names(NUM_SYMBOLS)
    return list(simulate(symbols=symbols, seed=seed, start_time_us=10**15, num_events=num_events))


def wait_until_held(worker: RunningWorker) -> None:
    def held() -> bool:
        return worker.statistics().guard.restraint.held == HELD

    wait_until(held, LONG_S, "all lanes but the first to be held")


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_worker_that_is_short_finishes_every_lane_and_queues_little(
    make_settings: MakeSettings, engine: Engine, delivery: str
) -> None:
    settings = make_settings(
        worker={"delivery": delivery, "max_batch": 64},
        guard=ALWAYS_SHORT,
        lanes={"background": {"reserved_share": 0.001}},
    )
    sent = {"realtime": 600, "market-data": 600, "background": 500}
    with running_worker(settings, engine) as worker:
        wait_until_held(worker)
        assert worker._worker is not None
        max_queued = worker._worker.max_queued("background")
        assert max_queued < 200, "a second of a thousandth of what the model does"
        with MarketEventProducer(settings) as producer:
            for seed, (lane, num_events) in enumerate(sent.items()):
                for event in tape(num_events, seed):
                    producer.produce(event, lane=lane)
            producer.flush()

        most_queued = 0

        def ended() -> bool:
            nonlocal most_queued
            now = worker.statistics()
            most_queued = max(most_queued, now.queued["background"])
            return all(
                now.lanes[lane].records == num and not now.lanes[lane].in_flight
                for lane, num in sent.items()
            )

        wait_until(ended, LONG_S, "every lane to be finished")
        assert 0 < most_queued <= max_queued
    out = features(settings, sum(sent.values()) - len(sent) * WARM_UP)
    assert_once_and_in_order(out)
    assert worker.last_statistics().guard.steps["memory", "hold"] == len(HELD)
    assert {num for num in worker.last_statistics().batch_sizes if num > 4} == set()


def test_lane_keeps_its_share_while_it_is_held_and_others_are_full(
    make_settings: MakeSettings, engine: Engine
) -> None:
    """Also with a queue so short that its partitions are paused most of the time."""
    settings = make_settings(
        worker={"max_batch": 64},
        guard=ALWAYS_SHORT,
        lanes={"realtime": {"reserved_share": 0.1}, "background": {"reserved_share": 0.1}},
    )
    num_events = 12_000
    with running_worker(settings, engine) as worker:
        wait_until_held(worker)
        with MarketEventProducer(settings) as producer:
            for pair in zip(tape(num_events, 1), tape(num_events, 2), strict=True):
                for event, lane in zip(pair, ("realtime", "background"), strict=True):
                    producer.produce(event, lane=lane)
            producer.flush()

        before = worker.statistics().scheduled
        wait_until(
            lambda: worker.statistics().scheduled["realtime"] >= before["realtime"] + 2_000,
            LONG_S,
            "2,000 records of realtime, which has more than enough",
        )
        now = worker.statistics()
        assert now.queued["realtime"], "it was full to the end"
        ours, theirs = (now.scheduled[lane] - before[lane] for lane in ("background", "realtime"))
        assert ours / (ours + theirs) == pytest.approx(0.1, abs=0.03)
