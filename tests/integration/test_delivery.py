"""What the two deliveries promise, on the real broker: aborts, zombies, rebalances, bad models."""

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from confluent_kafka import Producer
from numpy.typing import NDArray
from pipeline import (
    LONG_S,
    RunningWorker,
    assert_once_and_in_order,
    features,
    local,
    produce,
    running_worker,
)
from stand_ins import FakeModel
from waiting import wait_until

from consumers.envelopes import REPLAYED_FROM_HEADER
from consumers.parcels import Outgoing
from consumers.records import CommitPoint
from consumers.transactions import LaneTransactions
from inference.client import Inference, LocalInferencer
from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.codec import Codec
from schemas.errors import AssignmentLost, ConfigError, DeadLetterFlood, TapelineError
from schemas.messages import MarketEvent
from schemas.settings import Settings
from tapeline.demo import embedded_broker
from tapeline.lag import lane_lags
from tapeline.simulator import simulate, symbol_names
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
WARM_UP = 59


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1)
    return Engine(seeded_artifact(config=config), device="cpu", max_batch=64)


def tape(num_events: int, *, num_symbols: int = 4, seed: int = 3) -> list[MarketEvent]:
    symbols = symbol_names(num_symbols)
    return list(simulate(symbols=symbols, seed=seed, start_time_us=10**15, num_events=num_events))


def owed(events: Sequence[MarketEvent]) -> int:
    times = Counter(event.symbol for event in events)
    return sum(max(0, count - WARM_UP) for count in times.values())


def test_an_aborted_transaction_begins_again_at_the_last_commit(
    make_settings: MakeSettings, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its features are seen by no committed reader; their second making has the same bits."""
    settings = make_settings(worker={"delivery": "exactly_once", "max_batch": 32})
    transact, num_calls = LaneTransactions._transact, 0

    def sometimes_refused(
        self: LaneTransactions,
        messages: Sequence[Outgoing],
        points: Sequence[CommitPoint],
        place: object,
    ) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls % 2 == 0:
            return transact(self, messages, points, place)
        self._producer.begin_transaction()
        self._produce(messages)
        self._producer.flush(LONG_S)
        self._producer.abort_transaction(LONG_S)
        raise AssignmentLost("refused, for a test")

    monkeypatch.setattr(LaneTransactions, "_transact", sometimes_refused)
    events = tape(2_000)
    with running_worker(settings, engine) as worker:
        produce(settings, events[:1_000], "realtime")
        features(settings, owed(events[:1_000]))
        produce(settings, events[1_000:], "realtime")
        received = features(settings, owed(events))
        statistics = wait_until(
            lambda: all(not one.lag for one in lane_lags(settings)) and worker.statistics(),
            LONG_S,
            "the last commit",
        )
    assert len(received) == owed(events)
    assert_once_and_in_order(received)
    assert statistics.transactions["realtime"].aborted_total >= 2
    assert statistics.lanes["realtime"].abandoned > 0
    assert len(features(settings)) == owed(events), "and nothing comes later"

    smooth = make_settings()
    with running_worker(smooth, engine):
        produce(smooth, events, "realtime")
        expected = features(smooth, owed(events))
    bits = {one.feature.event_id: one.feature.features.tobytes() for one in expected}
    assert {one.feature.event_id: one.feature.features.tobytes() for one in received} == bits


def test_transactions_carry_the_replay_offset(make_settings: MakeSettings, engine: Engine) -> None:
    settings = make_settings(
        worker={"delivery": "exactly_once", "commit_interval_ms": 20},
        kafka={"num_partitions": 1},
    )
    events = tape(400, num_symbols=2)
    with running_worker(settings, engine):
        produce(settings, events[:300], "realtime")
        features(settings, owed(events[:300]))
        produce(settings, events[300:], "realtime")
        features(settings, owed(events))
    (lag,) = lane_lags(settings, [settings.lane("realtime")])
    assert lag.committed == 400
    assert lag.replay_from is not None
    assert 0 < lag.replay_from < 400 - 60


def test_of_two_workers_with_one_name_the_older_is_fenced(
    make_settings: MakeSettings, engine: Engine
) -> None:
    settings = make_settings(worker={"delivery": "exactly_once", "instance_id": "the-same"})
    ensure_topics(settings)
    events = tape(1_200)
    old = RunningWorker(settings, local(engine))
    produce(settings, events[:600], "realtime")
    old.wait_until_ended("realtime", 600)
    with running_worker(settings, engine):
        produce(settings, events[600:], "realtime")
        with pytest.raises(TapelineError, match=r"the-same is fenced .*worker\.instance_id"):
            wait_until(lambda: not old.is_alive, LONG_S, "the older one to end") and old.join()
        received = features(settings, owed(events))
    assert len(received) == owed(events)
    assert_once_and_in_order(received)


def test_exactly_once_is_refused_on_the_mock_broker(engine: Engine) -> None:
    with embedded_broker() as demo:
        worker = demo.worker.model_copy(update={"delivery": "exactly_once", "instance_id": "one"})
        refused = RunningWorker(demo.model_copy(update={"worker": worker}), local(engine))
        with pytest.raises(ConfigError, match="mock broker, whose transactions are hollow"):
            refused.join()


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
@pytest.mark.parametrize("group_protocol", ["classic", "consumer"])
def test_workers_come_and_go(
    make_settings: MakeSettings, engine: Engine, delivery: str, group_protocol: str
) -> None:
    """A rebalance with everything in flight: nothing lost, nothing twice, order kept."""
    settings = make_settings(worker={"delivery": delivery, "group_protocol": group_protocol})
    events = tape(3_000, num_symbols=12)
    with running_worker(settings, engine) as first:
        produce(settings, events[:1_000], "realtime")
        with running_worker(settings, engine) as second:
            produce(settings, events[1_000:2_000], "realtime")
            wait_until(
                lambda: (
                    second.statistics().num_partitions
                    and second.statistics().num_partitions + first.statistics().num_partitions == 20
                ),
                LONG_S,
                "both to own partitions",
            )
            produce(settings, events[2_000:2_500], "realtime")
        assert second.statistics().num_undrained == 0
        produce(settings, events[2_500:], "realtime")
        received = features(settings, owed(events))
    assert len(received) == owed(events)
    assert_once_and_in_order(received)
    assert second.statistics().lanes["realtime"].records > 0, "the second one had work"


def test_a_static_member_is_back_without_a_rebalance(
    make_settings: MakeSettings, engine: Engine
) -> None:
    """Its partitions wait for it, and the other worker's are not touched."""
    settings = make_settings(worker={"static_membership": True, "session_timeout_s": 30})
    events = tape(1_500, num_symbols=12)
    with running_worker(settings, engine) as stays:
        leaves = RunningWorker(settings, local(engine))
        wait_until(
            lambda: leaves.statistics().num_partitions == stays.statistics().num_partitions == 10,
            LONG_S,
            "both to own partitions",
        )
        produce(settings, events[:700], "realtime")
        leaves.stop()
        with running_worker(settings, engine) as back:
            produce(settings, events[700:], "realtime")
            received = features(settings, owed(events))
            assert back.statistics().num_partitions == 10
            assert stays.statistics().num_partitions == 10
    assert len(received) == owed(events)
    assert_once_and_in_order(received)


@pytest.mark.parametrize("group_protocol", ["classic", "consumer"])
def test_of_two_static_members_with_one_name_one_ends(
    make_settings: MakeSettings, engine: Engine, group_protocol: str
) -> None:
    """The older in a classic group, the newer with KIP-848: never both, one of them deaf."""
    settings = make_settings(
        worker={
            "static_membership": True,
            "instance_id": "the-same",
            "group_protocol": group_protocol,
        }
    )
    ensure_topics(settings)
    events = tape(400)
    workers = [RunningWorker(settings, local(engine))]
    wait_until(lambda: workers[0].statistics().num_partitions == 20, LONG_S, "the first to own all")
    workers.append(RunningWorker(settings, local(engine)))
    wait_until(lambda: not all(one.is_alive for one in workers), LONG_S, "one of them to end")
    ended, lives = sorted(workers, key=lambda one: one.is_alive)
    with pytest.raises(TapelineError, match="start this worker again"):
        ended.join()
    produce(settings, events, "realtime")
    assert len(features(settings, owed(events))) == owed(events)
    lives.stop()


class Picky(LocalInferencer):
    """The engine, but for the windows that it does not like."""

    def __init__(self, engine: Engine) -> None:
        self.answer = self._infer_liked
        super().__init__(FakeModel(lambda windows: self.answer(windows), engine.describe()))
        self.disliked: set[bytes] = set()
        self._engine = engine

    def _infer_liked(self, windows: NDArray[np.float32]) -> Inference:
        if self.disliked & {window.tobytes() for window in windows}:
            raise RuntimeError("CUDA error, say")
        return self._engine.infer(windows)


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_a_record_that_the_model_fails_on_is_a_dead_letter_and_may_come_again(
    make_settings: MakeSettings, engine: Engine, delivery: str
) -> None:
    """Alone; its neighbours have their features. Replayed, it counts once however often it comes.

    Once more after a restart, when its id is known to Redis alone.
    """
    settings = make_settings(worker={"delivery": delivery}, kafka={"num_partitions": 1})
    lane = settings.lane("realtime")
    (*events, last) = tape(301, num_symbols=1)
    picky = Picky(engine)
    seen: list[bytes] = []
    whole = picky._engine.infer
    bad = events[200]

    def note(windows: NDArray[np.float32]) -> Inference:
        if not picky.disliked:  # its window is known only when it is there
            seen.extend(window.tobytes() for window in windows)
            picky.disliked = set(seen[200 - WARM_UP :][:1])
        return picky._infer_liked(windows)

    picky.answer = note
    with running_worker(settings, engine, picky) as worker:
        produce(settings, events, "realtime")
        counts = worker.wait_until_ended("realtime", 300)
        assert (counts.features, counts.dead_letters) == (300 - WARM_UP - 1, 1)
        picky.answer = whole
    received = features(settings)
    assert bad.event_id not in {one.feature.event_id for one in received}
    assert_once_and_in_order(received)

    value = Codec(settings.schema_registry).encode_event(bad)
    claim = (REPLAYED_FROM_HEADER, f"{lane.topic}:0:200".encode())
    raw = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    with running_worker(settings, engine) as worker:
        for extra in ([], [claim], [claim]):
            raw.produce(lane.topic, value, bad.symbol, headers=extra)
        assert raw.flush(LONG_S) == 0
        produce(settings, [last], "realtime")
        counts = worker.wait_until_ended("realtime", 4)
    assert (counts.features, counts.duplicates) == (2, 2)
    again = [one.feature for one in features(settings) if one.feature.event_id == bad.event_id]
    assert [one.source_offset for one in again] == [301]


def test_a_flood_of_dead_letters_stops_the_worker(
    make_settings: MakeSettings, engine: Engine
) -> None:
    settings = make_settings(worker={"dlq_max_consecutive": 20, "max_batch": 16})
    ensure_topics(settings)
    worker = RunningWorker(settings, local(engine))
    produce(settings, tape(100), "realtime")
    raw = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    for _ in range(200):
        raw.produce(settings.lane("realtime").topic, b"not Avro", b"SIM00")
    assert raw.flush(LONG_S) == 0
    with pytest.raises(DeadLetterFlood, match=r"lane realtime: more than 20 dead letters in a row"):
        worker.join()
    counts = worker.last_statistics().lanes["realtime"]
    assert counts.dead_letters <= 20
    assert sum(one.lag for one in lane_lags(settings)) >= 180, "the rest is not committed"


class Held(LocalInferencer):
    """The engine, which answers only while it is let."""

    def __init__(self, engine: Engine, bucket_s: Mapping[int, float] | None = None) -> None:
        description = engine.describe()
        expected_s = bucket_s or description.bucket_s
        super().__init__(FakeModel(self._infer_when_let, replace(description, bucket_s=expected_s)))
        self.asked, self.let = threading.Event(), threading.Event()
        self._engine = engine

    def _infer_when_let(self, windows: NDArray[np.float32]) -> Inference:
        self.asked.set()
        self.let.wait(LONG_S)
        return self._engine.infer(windows)


def test_a_micro_batch_is_not_filled_while_the_model_is_busy(
    make_settings: MakeSettings, engine: Engine
) -> None:
    """Not even in the moment before the call to the model begins."""
    settings = make_settings(lanes={"realtime": {"max_batch": 4}}, kafka={"num_partitions": 1})
    ensure_topics(settings)
    events = tape(WARM_UP + 21, num_symbols=1)
    produce(settings, events, "realtime")
    held = Held(engine, bucket_s={4: LONG_S})
    with running_worker(settings, engine, held) as worker:
        try:
            assert held.asked.wait(LONG_S)
            assert worker.statistics().scheduled["realtime"] == WARM_UP + 1
        finally:
            held.let.set()
        worker.wait_until_ended("realtime", len(events))


def test_micro_batches_keep_their_distance(make_settings: MakeSettings, engine: Engine) -> None:
    """Records that come one by one, in less time than two intervals or three, go together."""
    settings = make_settings(worker={"batch_interval_ms": 3_000}, kafka={"num_partitions": 1})
    events = tape(WARM_UP + 20, num_symbols=1)
    with running_worker(settings, engine) as worker:
        produce(settings, events[:WARM_UP], "realtime")
        worker.wait_until_ended("realtime", WARM_UP)
        for event in events[WARM_UP:]:
            produce(settings, [event], "realtime")
        worker.wait_until_ended("realtime", len(events))
        assert sum(worker.statistics().batch_sizes.values()) < 10


def test_a_full_micro_batch_waits_for_no_interval(
    make_settings: MakeSettings, engine: Engine
) -> None:
    """Of a backlog only what fills none is left for later."""
    settings = make_settings(
        worker={"batch_interval_ms": 10 * LONG_S * 1000, "max_batch": 4},
        kafka={"num_partitions": 1},
    )
    ensure_topics(settings)
    events = tape(WARM_UP + 50, num_symbols=1)
    produce(settings, events, "realtime")
    with running_worker(settings, engine) as worker:
        wait_until(
            lambda: worker.statistics().scheduled["realtime"] >= len(events) - 4,
            LONG_S,
            "the backlog to be taken",
        )


def test_a_head_that_does_not_move_is_named(make_settings: MakeSettings, engine: Engine) -> None:
    settings = make_settings(worker={"stall_after_s": 0.2}, kafka={"num_partitions": 1})
    events = tape(WARM_UP + 5, num_symbols=1)
    held = Held(engine)
    with running_worker(settings, engine, held) as worker:
        worker.check_health()
        produce(settings, events[:WARM_UP], "realtime")
        worker.wait_until_ended("realtime", WARM_UP)
        produce(settings, events[WARM_UP:], "realtime")
        (head,) = wait_until(lambda: worker.statistics().stalled, LONG_S, "the stall to be seen")
        assert head.partition == (settings.lane("realtime").topic, 0)
        assert head.offset == WARM_UP
        with pytest.raises(TapelineError, match=rf"realtime \[0\] at offset {WARM_UP} for"):
            worker.check_health()
        held.let.set()
        wait_until(lambda: not worker.statistics().stalled, LONG_S, "the head to move")
        worker.check_health()
        assert len(features(settings, 5)) == 5


def test_a_process_that_hangs_in_its_stop_ends_itself() -> None:
    program = (
        "import threading; from tapeline.app import _end_process_after\n"
        "_end_process_after(0.05); threading.Event().wait()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=LONG_S
    )
    assert ended.returncode == 1
    assert "worker_hangs" in ended.stderr + ended.stdout
    assert "in wait" in ended.stderr, "where it hangs"


@pytest.mark.parametrize(("across_lanes", "times"), [(True, 1), (False, 2)])
def test_an_id_counts_once_in_all_lanes_or_once_in_each(
    make_settings: MakeSettings, engine: Engine, across_lanes: bool, times: int
) -> None:
    settings = make_settings(redis={"across_lanes": across_lanes})
    filling, (twin,) = tape(2 * WARM_UP, num_symbols=1), tape(1, num_symbols=1, seed=99)
    with running_worker(settings, engine) as worker:
        for lane, part in (("realtime", filling[:WARM_UP]), ("batch", filling[WARM_UP:])):
            produce(settings, part, lane)
            worker.wait_until_ended(lane, WARM_UP)
        produce(settings, [twin], "realtime")
        worker.wait_until_ended("realtime", WARM_UP + 1)
        produce(settings, [twin], "batch")
        worker.wait_until_ended("batch", WARM_UP + 1)
        with suppress(TimeoutError):
            received = features(settings)
    assert [one.feature.event_id for one in received] == [twin.event_id] * times
