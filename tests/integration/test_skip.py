"""A lane that skips what is late, on the real broker: fewer features, the same, all accounted for.

Lateness is certain without waiting: a deadline of a microsecond is past for whatever was appended
before the worker started, and one of ten minutes is not. A deadline may change while workers run.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
from confluent_kafka import Producer
from pipeline import LONG_S, assert_once_and_in_order, features, produce, running_worker

from consumers.metrics import LaneCounts
from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.codec import Codec
from schemas.live import with_live_part
from schemas.messages import FeatureVector, Flags, MarketEvent
from schemas.settings import Settings
from tapeline.audit import audit
from tapeline.simulator import simulate, symbol_names
from tapeline.subscriber import FeatureRecord
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
LANE = "realtime"
SYMBOLS = symbol_names(3)
NUM_LATE, NUM_TIMELY = 400, 200
NUM_WARM_UP = 59 * len(SYMBOLS)
NUM_SKIPPED = NUM_LATE - NUM_WARM_UP


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1)
    return Engine(seeded_artifact(config=config), device="cpu", max_batch=64)


@pytest.fixture(scope="module")
def events() -> list[MarketEvent]:
    num_events = NUM_LATE + NUM_TIMELY
    start_us = 1_700_000_000_000_000
    return list(simulate(symbols=SYMBOLS, seed=7, start_time_us=start_us, num_events=num_events))


def impatient(make_settings: MakeSettings, **overrides: object) -> Settings:
    """Everything is late; the topics are there."""
    lanes = {LANE: {"expired": "skip", "deadline_ms": 0.001}}
    settings = make_settings(lanes=lanes, **overrides)
    ensure_topics(settings)
    return settings


def patient(settings: Settings) -> Settings:
    """Nothing is late."""
    return with_live_part(settings, {"lanes": {LANE: {"deadline_ms": 600_000}}, "worker": {}})


def without_skipping(
    make_settings: MakeSettings, engine: Engine, events: Sequence[MarketEvent]
) -> dict[str, FeatureVector]:
    """What a lane that says ``process`` makes of the same events, by event id."""
    settings = make_settings(lanes={LANE: {"expired": "process"}})
    with running_worker(settings, engine) as worker:
        produce(settings, events, LANE)
        counts = worker.wait_until_ended(LANE, len(events))
        received = features(settings, counts.features)
    assert counts.features == len(received) == len(events) - NUM_WARM_UP
    return {record.feature.event_id: record.feature for record in received}


def assert_timely_and_alike(
    received: Iterable[FeatureRecord],
    timely: Sequence[MarketEvent],
    expected: dict[str, FeatureVector],
) -> None:
    """One feature for each timely event, with the bits and flags that nothing skipped gives."""
    assert_once_and_in_order(received)
    by_id = {record.feature.event_id: record.feature for record in received}
    assert by_id.keys() == {event.event_id for event in timely}
    for event_id, feature in by_id.items():
        other = expected[event_id]
        assert feature.features.tobytes() == other.features.tobytes()
        assert feature.flags & ~Flags.SKIPPED == other.flags


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_late_events_are_rows_without_features_and_the_next_one_says_so(
    make_settings: MakeSettings, engine: Engine, events: list[MarketEvent], delivery: str
) -> None:
    expected = without_skipping(make_settings, engine, events)
    late, timely = events[:NUM_LATE], events[NUM_LATE:]
    settings = impatient(make_settings, worker={"delivery": delivery})
    produce(settings, late, LANE)
    with running_worker(settings, engine) as worker:
        counts = worker.wait_until_ended(LANE, NUM_LATE)
        assert counts == LaneCounts(records=NUM_LATE, warm_up=NUM_WARM_UP, skipped=NUM_SKIPPED)
        worker.configure(patient(settings))
        produce(settings, timely, LANE)
        counts = worker.wait_until_ended(LANE, len(events))
        received = features(settings, NUM_TIMELY)
    assert counts == LaneCounts(
        records=len(events), features=NUM_TIMELY, warm_up=NUM_WARM_UP, skipped=NUM_SKIPPED
    )
    assert_timely_and_alike(received, timely, expected)

    first_ids = {event.symbol: event.event_id for event in reversed(timely)}
    assert first_ids.keys() == set(SYMBOLS)
    flagged = {one.feature.event_id for one in received if one.feature.flags & Flags.SKIPPED}
    assert flagged == set(first_ids.values())

    report = audit(settings, settled=True)
    assert report.is_clean, report.first_violation
    lane = next(one for one in report.lanes if one.lane == LANE)
    assert (lane.records, lane.warm_up, lane.skipped) == (len(events), NUM_WARM_UP, NUM_SKIPPED)
    assert lane.owed == lane.features == NUM_TIMELY
    assert (lane.repeats, lane.thinned, lane.duplicates, lane.dead_letters) == (0, 0, 0, 0)
    assert (lane.optional, lane.pending, lane.unprovable) == (0, 0, 0)


def test_a_missing_feature_of_an_event_that_was_not_late_is_lost(
    make_settings: MakeSettings, engine: Engine, events: list[MarketEvent]
) -> None:
    """An auditor who holds the lane to a longer deadline excuses nothing."""
    settings = impatient(make_settings)
    produce(settings, events[:NUM_LATE], LANE)
    with running_worker(settings, engine) as worker:
        worker.wait_until_ended(LANE, NUM_LATE)
        worker.configure(patient(settings))
        produce(settings, events[NUM_LATE:], LANE)
        worker.wait_until_ended(LANE, len(events))
    report = audit(patient(settings), [LANE], settled=True)
    assert report.lanes[0].violations["lost"] == NUM_SKIPPED
    assert report.first_violation is not None
    assert report.first_violation.kind == "lost"
    assert "not past its deadline" in report.first_violation.sentence


def test_skipped_events_are_in_the_windows_that_a_restart_rebuilds(
    make_settings: MakeSettings, engine: Engine, events: list[MarketEvent]
) -> None:
    """Only the note that something was skipped does not outlive the worker."""
    expected = without_skipping(make_settings, engine, events)
    late, timely = events[:NUM_LATE], events[NUM_LATE:]
    settings = impatient(make_settings)
    produce(settings, late, LANE)
    with running_worker(settings, engine) as worker:
        worker.wait_until_ended(LANE, NUM_LATE)
    with running_worker(patient(settings), engine) as worker:
        produce(settings, timely, LANE)
        counts = worker.wait_until_ended(LANE, NUM_TIMELY)
        received = features(settings, NUM_TIMELY)
    assert counts.replayed > 0
    assert counts == LaneCounts(records=NUM_TIMELY, features=NUM_TIMELY, replayed=counts.replayed)
    assert_timely_and_alike(received, timely, expected)
    assert not any(record.feature.flags & Flags.SKIPPED for record in received)

    # The same feature from a pass that did remember is the same feature; one with a gap is not.
    lane, codec = settings.lane(LANE), Codec(settings.schema_registry)
    first = received[0].feature
    for flag, kinds in ((Flags.SKIPPED, set()), (Flags.GAP, {"differs"})):
        value = codec.encode_feature(replace(first, flags=first.flags ^ flag))
        producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
        producer.produce(lane.output_topic, value, key=first.symbol)
        assert producer.flush(LONG_S) == 0
        report = audit(settings, [LANE], settled=True)
        assert {one.kind for one in report.violations} == kinds
    assert report.lanes[0].repeats == 2
    assert report.lanes[0].skipped == NUM_SKIPPED
