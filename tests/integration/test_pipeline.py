"""The main job on the real broker and the real Redis: market events in, features out."""

import asyncio
import json
import random
import signal
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import offline
import pytest
import torch
from confluent_kafka import Consumer, Producer
from numpy.typing import NDArray
from pipeline import (
    LONG_S,
    RunningWorker,
    assert_once_and_in_order,
    features,
    local,
    produce,
    running_worker,
    worker_process,
)
from waiting import wait_until

from inference.artifact import Artifact, save_artifact
from inference.client import Inference, ModelDescription
from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.codec import FINGERPRINT_HEADER, Codec
from schemas.errors import TransientError
from schemas.messages import Flags, MarketEvent, Quote, Sample, Trade
from schemas.settings import Settings
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.sources import open_source
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
CAPTURES = Path(__file__).parents[2] / "../shared/data/binance_feeds"
needs_captures = pytest.mark.skipif(
    not CAPTURES.is_dir(), reason=f"the market data is not there: {CAPTURES}"
)


@pytest.fixture(scope="module")
def small_artifact() -> Artifact:
    return seeded_artifact(config=ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1))


@pytest.fixture(scope="module")
def small_engine(small_artifact: Artifact) -> Engine:
    """A model of the usual shape, made small: these tests are about the way there and back."""
    return Engine(small_artifact, device="cpu", max_batch=64)


def simulated(num_events: int, *, num_symbols: int = 5, seed: int = 7) -> list[MarketEvent]:
    return list(
        simulate(
            symbols=symbol_names(num_symbols),
            seed=seed,
            start_time_us=1_700_000_000_000_000,
            num_events=num_events,
        )
    )


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_every_full_window_gives_one_feature_in_order(
    make_settings: MakeSettings, small_engine: Engine, delivery: str
) -> None:
    """Counts of both ends add up, on every lane at once."""
    settings = make_settings(worker={"delivery": delivery})
    tapes = {
        lane.name: simulated(1_000, seed=rank) for rank, lane in enumerate(settings.active_lanes)
    }
    with running_worker(settings, small_engine) as worker:
        for lane, events in tapes.items():
            assert produce(settings, events, lane) == 1_000
        counts = {lane: worker.wait_until_ended(lane, 1_000) for lane in tapes}
        received = features(settings, sum(count.features for count in counts.values()))
    assert_once_and_in_order(received)
    for lane, events in tapes.items():
        in_lane = [record.feature for record in received if record.feature.lane == lane]
        num_symbols = len({event.symbol for event in events})
        assert counts[lane].warm_up == 59 * num_symbols
        assert len(in_lane) == counts[lane].features == 1_000 - 59 * num_symbols
        times = {event.event_id: event.event_time_us for event in events}
        assert all(one.event_time_us == times[one.event_id] for one in in_lane)
        assert {one.model_version for one in in_lane} == {small_engine.describe().model_version}


@needs_captures
@pytest.mark.parametrize("name", ["spot_btcusdt_20240808.gz", "usdm_ethusdt_20240808.gz"])
def test_features_equal_an_independent_recomputation(settings: Settings, name: str) -> None:
    """Plain Python and numpy from the file, the fp32 model straight on it: within 1e-5."""
    num_events = 3_000
    artifact = seeded_artifact()
    expected = offline.windows(CAPTURES / name, num_events)
    with open_source(CAPTURES / name) as source, torch.inference_mode():
        events = list(islice(source, num_events))
        outputs, _ = artifact.build_model()(torch.from_numpy(np.stack(list(expected.values()))))
    with running_worker(settings, Engine(artifact, device="cpu", max_batch=64)) as worker:
        produce(settings, events, "realtime")
        counts = worker.wait_until_ended("realtime", num_events)
        received = features(settings, counts.features)
    assert counts.warm_up == 59
    assert_once_and_in_order(received)
    by_id = {record.feature.event_id: record.feature.features for record in received}
    assert by_id.keys() == expected.keys()
    actual = np.stack([by_id[event_id] for event_id in expected])
    np.testing.assert_allclose(actual, outputs.numpy(), rtol=0, atol=1e-5)


class Overtaking:
    """A real engine whose every other answer is held back until the next one is out."""

    def __init__(self, engine: Engine) -> None:
        self._inner = local(engine)
        self._num_calls = 0
        self._next_done = asyncio.Event()
        self.num_overtaken = 0

    async def infer(
        self, windows: NDArray[np.float32], model_version: str | None = None
    ) -> Inference:
        self._num_calls += 1
        held_back = self._num_calls % 2 == 1
        if held_back:
            self._next_done.clear()
        inference = await self._inner.infer(windows)
        if not held_back:
            self._next_done.set()
            return inference
        with suppress(TimeoutError):  # the last call has none behind it
            await asyncio.wait_for(self._next_done.wait(), 1)
            self.num_overtaken += 1
        return inference

    async def describe(self) -> ModelDescription:
        return await self._inner.describe()

    async def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        return await self._inner.prepare(versions)

    async def close(self) -> None:
        await self._inner.close()


def test_features_stay_in_order_when_micro_batches_overtake_each_other(
    make_settings: MakeSettings, small_engine: Engine
) -> None:
    settings = make_settings(worker={"max_batch": 16, "max_in_flight": 4})
    overtaking = Overtaking(small_engine)
    events = simulated(1_500, num_symbols=3)
    with running_worker(settings, small_engine, overtaking) as worker:
        produce(settings, events, "realtime")
        counts = worker.wait_until_ended("realtime", len(events))
        received = features(settings, counts.features)
    assert overtaking.num_overtaken > 10
    assert len(received) == len(events) - 59 * 3
    assert_once_and_in_order(received)


def test_duplicates_are_dropped_on_every_lane(settings: Settings, small_engine: Engine) -> None:
    events = simulated(600)
    shuffled = random.Random(0).sample(events, 100)
    with running_worker(settings, small_engine) as worker:
        produce(settings, events, "realtime")
        produce(settings, shuffled, "realtime")
        in_realtime = worker.wait_until_ended("realtime", 700)
        produce(settings, shuffled, "batch")  # another lane, and still the same events
        in_batch = worker.wait_until_ended("batch", 100)
        received = features(settings, in_realtime.features)
    assert (in_realtime.duplicates, in_batch.duplicates) == (100, 100)
    assert len(received) == 600 - 59 * 5
    assert_once_and_in_order(received)


def test_poison_goes_to_the_dlq_and_the_rest_unharmed(
    make_settings: MakeSettings, small_engine: Engine
) -> None:
    settings = make_settings(lanes={"realtime": {"max_queued_records": 64}})
    codec = Codec(settings.schema_registry)
    events = simulated(300, num_symbols=1)
    good = codec.encode_event(events[0])
    lane = settings.lane("realtime")
    fingerprint: dict[str, bytes | None] = {
        FINGERPRINT_HEADER: codec.event_prefix[2:].hex().encode()
    }

    def spoiled(**changes: object) -> bytes:
        """An event that our own producer would refuse, as Avro all the same."""
        fields = {name: getattr(events[0], name) for name in events[0].__struct_fields__}
        return _unchecked(codec, MarketEvent(**fields | changes))

    poison: dict[str, tuple[bytes | None, dict[str, bytes | None]]] = {
        "random bytes": (random.Random(1).randbytes(500), fingerprint),
        "truncated": (good[:-3], fingerprint),
        "bytes behind": (good + b"x", fingerprint),
        "unknown fingerprint": (b"\xc3\x01" + bytes(8) + good[10:], {}),
        "unknown header": (good[10:], {FINGERPRINT_HEADER: b"0123456789abcdef"}),
        "no fingerprint": (good[10:], {}),
        "tombstone": (None, fingerprint),
        "NaN": (spoiled(payload=Trade(float("nan"), 1.0)), fingerprint),
        "negative size": (spoiled(payload=Quote(1.0, -1.0, 2.0, 1.0)), fingerprint),
        "wrong sample": (spoiled(payload=Sample.from_values(np.zeros(7))), fingerprint),
        "10 MB": (bytes(10_000_000), fingerprint),
    }
    reasons = {
        "random bytes": "bad_avro", "truncated": "bad_avro", "bytes behind": "bad_avro",
        "unknown fingerprint": "unknown_schema", "no fingerprint": "unknown_schema",
        "unknown header": "unknown_schema",
        "tombstone": "no_value", "NaN": "not_finite", "negative size": "negative_size",
        "wrong sample": "bad_sample", "10 MB": "too_large",
    }  # fmt: skip
    raw = Producer(
        {"bootstrap.servers": settings.kafka.bootstrap_servers, "message.max.bytes": 12_000_000}
    )
    with running_worker(settings, small_engine) as worker:
        produce(settings, events[:150], "realtime")
        for name, (value, extra) in poison.items():
            sent = {**extra, "name": name.encode(), "traceparent": b"00-1-2-01"}
            raw.produce(lane.topic, value, events[0].symbol, headers=list(sent.items()))
        assert raw.flush(LONG_S) == 0
        produce(settings, events[150:], "realtime")
        counts = worker.wait_until_ended("realtime", 300 + len(poison))
        received = features(settings, counts.features)
    assert counts.dead_letters == len(poison)
    assert len(received) == 300 - 59
    assert_once_and_in_order(received)

    letters = _read_all(settings, lane.dlq_topic, len(poison))
    for message in letters:
        letter = codec.decode_dead_letter(message.value(), message.headers())
        name = dict(letter.headers)["name"].decode()
        value, extra = poison.pop(name)
        assert (letter.value, letter.key) == (value, events[0].symbol.encode())
        assert dict(letter.headers).items() >= extra.items()
        assert letter.reason == reasons[name], name
        assert (letter.source_topic, letter.lane) == (lane.topic, "realtime")
        shown = dict(message.headers())
        assert shown["dlq-reason"] == letter.reason.encode()
        assert shown["dlq-message"] == letter.message.encode()
        assert shown["dlq-source"].decode().startswith(f"{lane.topic}:")
    assert not poison


def test_features_after_a_restart_are_bit_identical(
    make_settings: MakeSettings, small_artifact: Artifact, small_engine: Engine, tmp_path: Path
) -> None:
    """One kill -9 and one SIGTERM in mid-stream, against a run that was never interrupted."""
    save_artifact(small_artifact, artifact := tmp_path / "artifact")
    events = simulated(6_000, num_symbols=8)
    smooth = make_settings()
    with running_worker(smooth, small_engine) as worker:
        produce(smooth, events, "realtime")
        expected_counts = worker.wait_until_ended("realtime", len(events))
    expected = {record.feature.event_id: record.feature for record in features(smooth)}
    assert len(expected) == expected_counts.features == 6_000 - 59 * 8

    rough = make_settings(
        kafka={"client": {"session.timeout.ms": 6_000, "heartbeat.interval.ms": 500}},
        worker={"commit_interval_ms": 50, "max_batch": 32},
    )
    ensure_topics(rough)
    log = tmp_path / "worker.log"
    thirds = [events[:2_000], events[2_000:4_000], events[4_000:]]
    ends = [signal.SIGKILL, signal.SIGTERM, signal.SIGTERM]
    num_features = 0
    num_replayed: list[int] = []
    for part, end in zip(thirds, ends, strict=True):
        with worker_process(rough, artifact, log) as process:
            produce(rough, part[:1_500], "realtime")
            # In the middle of this part, with more on its way; a worker that dies is seen, too.
            seen = features(rough, num_features + 700)
            assert process.poll() is None, log.read_text()[-2_000:]
            assert len(seen) == num_features + 700
            produce(rough, part[1_500:], "realtime")
            if part is thirds[-1]:
                wait_until(
                    lambda: len({one.feature.event_id for one in features(rough)}) == len(expected),
                    LONG_S,
                    "the last feature",
                )
            process.send_signal(end)
            printed, _ = process.communicate(timeout=LONG_S)
            assert process.returncode == (0 if end == signal.SIGTERM else -end)
            if printed:
                num_replayed.append(json.loads(printed)["realtime"]["replayed"])
        num_features = len(features(rough))
    received = features(rough)
    assert {record.feature.event_id for record in received} == expected.keys()
    for record in received:  # a copy from before the kill must have the same bits, too
        feature, other = record.feature, expected[record.feature.event_id]
        assert feature.features.tobytes() == other.features.tobytes()
        assert feature.flags & ~Flags.STALE == other.flags & ~Flags.STALE
    assert len(num_replayed) == 2
    assert all(num_replayed), "every restart rebuilt windows from the topic"


def _unchecked(codec: Codec, event: MarketEvent) -> bytes:
    payload = event.payload
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    named = {name: getattr(payload, name) for name in payload.__struct_fields__}
    fields["payload"] = (f"tapeline.{type(payload).__name__}", named)
    return codec._encode("market_event", fields)


def _read_all(settings: Settings, topic: str, num_messages: int) -> list:
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": f"{topic}.reader",
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([topic])
    messages: list = []

    def enough() -> bool:
        messages.extend(consumer.consume(num_messages, 0.2))
        return len(messages) >= num_messages

    wait_until(enough, LONG_S, f"{num_messages} messages of {topic}")
    consumer.close()
    assert all(message.error() is None for message in messages)
    return messages


def test_a_lane_may_ask_for_fewer_features(
    make_settings: MakeSettings, small_engine: Engine
) -> None:
    """By stride or by interval of event time; what is left out is counted."""
    settings = make_settings(
        lanes={"realtime": {"stride": 3}, "batch": {"min_interval_ms": 50}},
    )
    strided, spaced = simulated(600, num_symbols=1, seed=1), simulated(600, num_symbols=1, seed=2)
    with running_worker(settings, small_engine) as worker:
        produce(settings, strided, "realtime")
        produce(settings, spaced, "batch")
        counts = {lane: worker.wait_until_ended(lane, 600) for lane in ("realtime", "batch")}
        received = features(settings, sum(one.features for one in counts.values()))
    by_stride = {one.event_id for one in strided[59:] if crc32(one.event_id.encode()) % 3 == 0}
    intervals = [one.event_time_us // 50_000 for one in spaced]
    by_interval = {
        one.event_id
        for one, now, before in zip(spaced[59:], intervals[59:], intervals[58:], strict=False)
        if now != before
    }
    assert {one.feature.event_id for one in received} == by_stride | by_interval
    assert 0 < len(by_interval) < len(by_stride) < 541
    assert counts["realtime"].thinned == 541 - len(by_stride)
    assert counts["batch"].thinned == 541 - len(by_interval)


def test_a_trace_travels_from_the_event_to_its_feature(
    settings: Settings, small_engine: Engine
) -> None:
    trace = ("traceparent", b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    events = simulated(60, num_symbols=1)
    with running_worker(settings, small_engine):
        with MarketEventProducer(settings) as producer:
            for event in events:
                producer.produce(event, headers=[trace])
        (record,) = features(settings, 1)
    assert trace in record.headers
    assert record.source_appended_us is not None
    assert 0 <= record.latency_us < LONG_S * 1e6


class Gone:
    """A model that stays away: every call fails as a dead replica's does."""

    def __init__(self, engine: Engine) -> None:
        self._description = engine.describe()

    async def infer(
        self, windows: NDArray[np.float32], model_version: str | None = None
    ) -> Inference:
        raise TransientError("the model is gone")

    async def describe(self) -> ModelDescription:
        return self._description

    async def prepare(self, versions: tuple[str, ...]) -> ModelDescription:
        return self._description

    async def close(self) -> None:
        pass


def test_a_model_that_stays_away_ends_the_worker_and_loses_nothing(
    make_settings: MakeSettings, small_engine: Engine
) -> None:
    """It leaves its group at once, commits nothing unfinished, and the next one goes on."""
    settings = make_settings(worker={"retry_deadline_s": 1, "commit_interval_ms": 50})
    events = simulated(300, num_symbols=1)
    ensure_topics(settings)
    failing = RunningWorker(settings, Gone(small_engine))
    produce(settings, events, "realtime")
    with pytest.raises(TransientError, match="the model is gone"):
        failing.join()
    with running_worker(settings, small_engine) as worker:
        received = features(settings, 300 - 59)
        worker.stop()
    assert len(received) == 300 - 59
    assert_once_and_in_order(received)
