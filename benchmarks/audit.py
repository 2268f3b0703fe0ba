"""How fast an audit is, and what it holds in memory: a real broker, a tape, and its features.

    python -m benchmarks.audit --events 100000

The features are made up, for no model is needed to check books.
"""

import argparse
import json
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from confluent_kafka import Producer

from schemas.codec import Codec
from schemas.messages import FeatureVector, MarketEvent
from schemas.settings import Settings, load_settings
from tapeline.audit import audit
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.stack import Stack
from tapeline.topics import ensure_topics

_LANE = "realtime"
_NUM_FEATURES = 64


def main() -> None:
    """Prints one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stack = Stack.on_free_ports(load_settings(state_dir=Path(folder)))
        try:
            endpoint = stack.start("kafka").endpoint
            settings = load_settings(kafka={"bootstrap_servers": endpoint})
            ensure_topics(settings)
            _fill(settings, options.events)
            _pay(settings, options.events)
            began_s = time.process_time()
            report = audit(settings, settled=True)
            cpu_s = time.process_time() - began_s
            assert report.is_clean, report.first_violation
            tracemalloc.start()
            audit(settings, settled=True)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            stack.down(purge=True)
    print(
        json.dumps(
            {
                "records_read": report.num_read,
                "records_per_second": round(report.num_read / report.seconds),
                "records_per_cpu_second": round(report.num_read / cpu_s),
                "seconds": round(report.seconds, 2),
                "peak_bytes_per_input_record": round(peak_bytes / options.events),
            },
            indent=2,
        )
    )


def _tape(num_events: int) -> Iterator[MarketEvent]:
    return simulate(
        symbols=symbol_names(10),
        seed=1,
        start_time_us=1_700_000_000_000_000,
        rate_hz=1000,
        num_events=num_events,
    )


def _fill(settings: Settings, num_events: int) -> None:
    with MarketEventProducer(settings) as producer:
        for event in _tape(num_events):
            producer.produce(event, lane=_LANE)
        producer.flush()


def _pay(settings: Settings, num_events: int) -> None:
    """A feature for everything that is owed, as the ledger itself says."""
    codec, lane = Codec(settings.schema_registry), settings.lane(_LANE)
    producer = Producer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "partitioner": "murmur2_random",
            "queue.buffering.max.messages": 1_000_000,
            "queue.buffering.max.kbytes": 1_048_576,
        }
    )
    owed = audit(settings, [_LANE], settled=True, max_violations=num_events).violations
    times = {event.event_id: event.event_time_us for event in _tape(num_events)}
    for one in owed:
        value = codec.encode_feature(
            FeatureVector(
                event_id=one.event_id,
                symbol=one.symbol,
                venue=one.venue,
                event_time_us=times[one.event_id],
                lane=_LANE,
                model_version="benchmark",
                channels_version="benchmark",
                source_topic=one.source.topic,
                source_partition=one.source.partition,
                source_offset=one.source.offset,
                features=np.zeros(_NUM_FEATURES, np.float32),
            )
        )
        producer.produce(lane.output_topic, value, key=one.symbol)
    assert producer.flush(60) == 0


if __name__ == "__main__":
    main()
