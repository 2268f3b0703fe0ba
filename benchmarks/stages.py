"""What an event costs the worker's processor, stage by stage.

    python -m benchmarks.stages [--events 40000] [--batch 256 --batch 1024] [--kind trade]
        [--kind book] [--symbols 10] [--rounds 3] [--json]

Starts a broker and a Redis of its own. The worker's own parts, one after another in one process,
each for all of the events in micro-batches of ``--batch``; processor time of the whole process an
event, the threads of the Kafka client included, the least of the rounds. The model is a mean over a
few channels, so that what is left is the stream's. What a running worker needs beside these (its
event loop, waiting, commits, metrics) is in ``python -m benchmarks.compare``.
"""

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import numpy as np
from confluent_kafka import Consumer, Producer, TopicPartition
from numpy.typing import NDArray

from benchmarks.lanes.load import own_topics
from benchmarks.tape import parts
from consumers.assignments import Assignments
from consumers.bisection import infer_each
from consumers.budget import BatchTimes, LatencyBudget
from consumers.channels import channel_set
from consumers.columns import EventDecoder
from consumers.dedup import FirstSeen, open_first_seen
from consumers.intake import Intake
from consumers.items import Items
from consumers.metrics import LaneCounts
from consumers.packing import Packer
from consumers.parcels import Parcel
from consumers.poller import records_of
from consumers.publisher import Publisher
from consumers.records import Assignment, Record
from consumers.windows import WindowStore
from inference.client import Inference, ModelDescription
from schemas.codec import Codec
from schemas.kafka import IDEMPOTENT, client_config, consume_ready, make_client
from schemas.messages import Book, MarketEvent, Trade
from schemas.settings import Settings
from tapeline.machine import this_machine
from tapeline.simulator import simulate, symbol_names

_LANE = "realtime"
_POLLED = 500
KINDS = {"trade": Trade, "book": Book}
_MODEL = ModelDescription("mean@1", "market50-v1", 50, 60, 8, ())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=40_000)
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--symbols", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    batches, kinds = options.batch or [256, 1024], options.kind or list(KINDS)
    machine = str(this_machine())
    found: dict[str, dict[str, float]] = {}
    with parts() as settings:
        for _ in range(options.rounds):
            for kind in kinds:
                events = _events(kind, options.events, options.symbols)
                for size in batches:
                    cost = asyncio.run(_measure(settings, events, size))
                    before = found.setdefault(f"{kind}, {size}", cost)
                    before.update({one: min(cost[one], before[one]) for one in cost})
    if options.json:
        print(json.dumps({"machine": machine, "us_an_event": found}, indent=2))
        return
    print(f"{machine}; us of processor time an event, the least of {options.rounds} rounds\n")
    print("| stage | " + " | ".join(found) + " |")
    print("| --- |" + " ---: |" * len(found))
    for stage in next(iter(found.values())):
        print(f"| {stage} | " + " | ".join(f"{one[stage]:.2f}" for one in found.values()) + " |")
    print("| all | " + " | ".join(f"{sum(one.values()):.2f}" for one in found.values()) + " |")


def _events(kind: str, num_events: int, num_symbols: int) -> list[MarketEvent]:
    """Of one kind; ids of their own, or a second pass would be of duplicates."""
    tape = simulate(symbols=symbol_names(num_symbols), seed=1, start_time_us=10**15)
    wanted = (one for one in tape if isinstance(one.payload, KINDS[kind]))
    run = uuid.uuid4().hex[:8]
    return [
        MarketEvent(f"{run}-{number}", one.symbol, one.venue, one.event_time_us, one.payload)
        for number, one in enumerate(islice(wanted, num_events))
    ]


class _Stages:
    """Processor time of this process by stage, in all."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun_s = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0) + time.process_time() - begun_s


async def _measure(
    settings: Settings, events: Sequence[MarketEvent], size: int
) -> dict[str, float]:
    lane = settings.lane(_LANE)
    with own_topics(settings, {_LANE: lane}) as own:
        first_seen = await open_first_seen(own.redis)
        stages = _Stages()
        try:
            _produce(own, events)
            with stages.stage("consume"):
                records = _consume(own, len(events))
            await _work(own, first_seen, records, size, stages)
        finally:
            await first_seen.close()
    return {name: 1e6 * seconds / len(events) for name, seconds in stages.seconds.items()}


def _produce(settings: Settings, events: Sequence[MarketEvent]) -> None:
    codec = Codec(settings.schema_registry)
    config = client_config(settings, defaults={"linger.ms": 20}, required=IDEMPOTENT)
    producer: Producer = make_client(Producer, config)
    topic = settings.lane(_LANE).topic
    for event in events:
        producer.produce(topic, codec.encode_event(event), event.symbol.encode())
        producer.poll(0)
    assert producer.flush(60) == 0


def _consume(settings: Settings, num_records: int) -> list[Record]:
    lane = settings.lane(_LANE)
    consumer: Consumer = make_client(Consumer, client_config(settings, defaults={"group.id": "x"}))
    numbers = range(settings.kafka.num_partitions)
    consumer.assign([TopicPartition(lane.topic, number, 0) for number in numbers])
    records: list[Record] = []
    while len(records) < num_records:
        records += records_of(lane, consume_ready(consumer, _POLLED, 1.0), 0)
    consumer.close()
    return records


async def _work(
    settings: Settings, first_seen: FirstSeen, records: list[Record], size: int, stages: _Stages
) -> None:
    """All of a worker's stages behind its pollers, a micro-batch after the other."""
    lane = settings.lane(_LANE)
    codec, counts = Codec(settings.schema_registry), {_LANE: LaneCounts()}
    windows = WindowStore(channel_set(settings.window.channel_set), settings.window)
    assignments = Assignments(windows)
    numbers = range(settings.kafka.num_partitions)
    assignments.take_on([Assignment((lane.topic, number), 0, 0) for number in numbers])
    intake = Intake(settings, first_seen, assignments, windows, codec, counts, time.time)
    packer = Packer(settings, codec, _MODEL, counts)
    publisher, budget = Publisher(settings), LatencyBudget([_LANE])
    serving = asyncio.create_task(publisher.run())
    decoder = EventDecoder(codec, windows.channels.check)
    parcels: list[Parcel] = []
    for begin in range(0, len(records), size):
        batch_records = records[begin : begin + size]
        progress = [assignments[record.partition] for record in batch_records]
        with stages.stage("decode"):
            decoded = decoder.decode(
                [record.value for record in batch_records],
                [record.headers for record in batch_records],
            )[0]
        with stages.stage("first seen"):
            await intake._drop_duplicates(Items(batch_records, progress, decoded))
        with stages.stage("prepare, all"):
            batch = await intake.prepare(batch_records)
        with stages.stage("model"):
            rows = await infer_each(_mean, batch.windows)
        times = BatchTimes(batch.taken_us, batch.given_us, batch.given_us)
        with stages.stage("pack"):
            packed = packer.pack(batch, rows, times, "mean@1", batch.given_us)
        with stages.stage("settle"):
            for parcel in packed:
                budget.observe(_LANE, parcel.features, times, batch.given_us)
        parcels += packed
    with stages.stage("publish"):  # behind the others: its client works in threads of its own
        for parcel in parcels:
            await publisher.send(parcel)
            await asyncio.sleep(0)
        await asyncio.gather(*(parcel.delivered for parcel in parcels))
    serving.cancel()
    seconds = stages.seconds
    seconds["window"] = seconds.pop("prepare, all") - seconds["decode"]


async def _mean(windows: NDArray[np.float32]) -> Inference:
    scores = np.empty((len(windows), 0), np.float32)
    return Inference(windows[:, :8].mean(axis=2), scores, "mean@1")


if __name__ == "__main__":
    main()
