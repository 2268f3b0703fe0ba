"""A backfill that runs again takes its features from the cache: the same bits, flagged, counted."""

import uuid
from collections.abc import Callable

import pytest
import redis as redis_client
from pipeline import assert_once_and_in_order, features, produce, running_worker

from consumers.metrics import WorkerStatistics
from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.messages import Flags, MarketEvent
from schemas.settings import Settings
from tapeline.audit import audit
from tapeline.simulator import simulate, symbol_names
from tapeline.subscriber import FeatureRecord

MakeSettings = Callable[..., Settings]
LANE, UNCACHED_LANE = "historical", "batch"
SYMBOLS = symbol_names(3)
NUM_EVENTS = 400
NUM_FEATURES = NUM_EVENTS - 59 * len(SYMBOLS)


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1, score_names=("up",))
    return Engine(seeded_artifact(config=config), device="cpu", max_batch=64)


@pytest.fixture(scope="module")
def events() -> list[MarketEvent]:
    start_us = 1_700_000_000_000_000
    return list(simulate(symbols=SYMBOLS, seed=7, start_time_us=start_us, num_events=NUM_EVENTS))


def backfill(
    settings: Settings, engine: Engine, events: list[MarketEvent], lane: str
) -> tuple[list[FeatureRecord], WorkerStatistics]:
    with running_worker(settings, engine) as worker:
        produce(settings, events, lane)
        worker.wait_until_ended(lane, len(events))
        statistics = worker.stop()
    received = features(settings, NUM_FEATURES)
    assert_once_and_in_order(received)
    report = audit(settings, settled=True)
    assert report.is_clean, report.violations
    return received, statistics


def bits(records: list[FeatureRecord]) -> dict[str, tuple[bytes, float]]:
    return {
        one.feature.event_id: (one.feature.features.tobytes(), one.feature.scores["up"])
        for one in records
    }


def test_a_backfill_that_runs_again_needs_no_model(
    make_settings: MakeSettings, engine: Engine, events: list[MarketEvent]
) -> None:
    cache = {"key_prefix": f"t{uuid.uuid4().hex}:", "recompute_share": 0.0}

    def settings() -> Settings:
        return make_settings(lanes={LANE: {"cache": True}}, cache=cache)

    plain, _ = backfill(make_settings(), engine, events, LANE)
    first, after_first = backfill(settings(), engine, events, LANE)
    num_calls = engine.statistics().num_calls
    again, after_again = backfill(settings(), engine, events, LANE)
    assert bits(first) == bits(again) == bits(plain)
    assert not any(one.feature.flags & Flags.CACHED for one in first)
    assert all(one.feature.flags & Flags.CACHED for one in again)
    assert (after_first.cache.hits, after_first.cache.misses) == (0, NUM_FEATURES)
    assert (after_again.cache.redis_hits, after_again.cache.misses) == (NUM_FEATURES, 0)
    assert engine.statistics().num_calls == num_calls, "the model was not called"

    first_settings = settings()
    assert first_settings.redis.url
    with redis_client.Redis.from_url(first_settings.redis.url) as client:
        names = list(client.scan_iter(f"{cache['key_prefix']}*"))
        assert len(names) == NUM_FEATURES
        for name in names:
            client.set(name, b"poison")
    mended, after_mended = backfill(first_settings, engine, events, LANE)
    assert bits(mended) == bits(plain)
    assert not any(one.feature.flags & Flags.CACHED for one in mended)
    assert after_mended.cache.rejected == NUM_FEATURES


def test_a_lane_that_does_not_ask_for_it_is_computed(
    make_settings: MakeSettings, engine: Engine, events: list[MarketEvent]
) -> None:
    settings = make_settings(lanes={LANE: {"cache": True}})
    received, statistics = backfill(settings, engine, events, UNCACHED_LANE)
    assert not any(one.feature.flags & Flags.CACHED for one in received)
    assert (statistics.cache.hits, statistics.cache.misses) == (0, 0)
