"""What Kafka's client costs a message, and what its settings change.

    python -m benchmarks.kafka [--messages 60000] [--rounds 3] [--json]

Starts a broker of its own. Messages of real events, 4 partitions, an idempotent producer as a
worker has it; each setting in turn, the least of the rounds. Processor time of this process a
message, in all and of the calling thread alone, and bytes a message in the topic.
"""

import argparse
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from benchmarks.tape import parts
from consumers.poller import records_of
from schemas.codec import Codec
from schemas.kafka import IDEMPOTENT, client_config, consume_ready, make_client
from schemas.lanes import LaneSettings
from schemas.settings import Settings
from tapeline.machine import this_machine
from tapeline.simulator import simulate, symbol_names

_NUM_PARTITIONS = 4
_HEADERS: list[tuple[str, str | bytes | None]] = [
    ("avro-fingerprint", b"8145035e693dcc65"),
    ("source-appended-us", b"17" * 8),
]
_SETTINGS: dict[str, dict[str, str | int]] = {
    "as a worker": {},
    "1 header": {},
    "2 headers": {},
    "no callback": {},
    "linger 0 ms": {"linger.ms": 0},
    "linger 5 ms": {"linger.ms": 5},
    "linger 20 ms": {"linger.ms": 20},
    "lz4": {"compression.type": "lz4"},
    "zstd": {"compression.type": "zstd"},
    "batch 16 kB": {"batch.size": 16_384},
    "fetch at least 64 kB": {"fetch.min.bytes": 65_536, "fetch.wait.max.ms": 20},
}
_FETCHING = ("fetch",)


@dataclass(slots=True)
class Cost:
    """One setting, us a message."""

    produce_us: float
    produce_thread_us: float
    consume_us: float
    bytes_each: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    machine = str(this_machine())
    found: dict[str, Cost] = {}
    with parts() as settings:
        messages = _messages(settings, options.messages)
        for _ in range(options.rounds):
            for name in _SETTINGS:
                cost = _measure(settings, name, messages)
                best = found.setdefault(name, cost)
                for field in ("produce_us", "produce_thread_us", "consume_us"):
                    setattr(best, field, min(getattr(best, field), getattr(cost, field)))
    if options.json:
        rows = {name: asdict(cost) for name, cost in found.items()}
        print(json.dumps({"machine": machine, "rows": rows}, indent=2))
        return
    print(f"{machine}; the least of {options.rounds} rounds of {options.messages:,} messages\n")
    print("| | produce, us | of it the calling thread | consume, us | bytes |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, one in found.items():
        print(
            f"| {name} | {one.produce_us:.2f} | {one.produce_thread_us:.2f} "
            f"| {one.consume_us:.2f} | {one.bytes_each:.0f} |"
        )


def _messages(settings: Settings, number: int) -> list[tuple[bytes, bytes]]:
    codec = Codec(settings.schema_registry)
    tape = simulate(symbols=symbol_names(50), seed=1, start_time_us=10**15)
    return [(one.symbol.encode(), codec.encode_event(one)) for one in islice(tape, number)]


def _measure(settings: Settings, name: str, messages: list[tuple[bytes, bytes]]) -> Cost:
    properties = _SETTINGS[name]
    consumes = {key: value for key, value in properties.items() if key.startswith(_FETCHING)}
    produces = {key: value for key, value in properties.items() if key not in consumes}
    num = len(messages)
    with _topic(settings) as topic:
        config = {"linger.ms": 1, "queue.buffering.max.messages": 1_000_000, **produces}
        producer: Producer = make_client(
            Producer, client_config(settings, defaults=config, required=IDEMPOTENT)
        )
        producer.list_topics(topic)
        num_headers = 2 if name == "2 headers" else int(name == "1 header")
        headers = _HEADERS[:num_headers]
        on_delivery = None if name == "no callback" else _note
        begun_s, thread_s = time.process_time(), time.thread_time()
        for key, value in messages:
            if headers:
                producer.produce(topic, value, key, headers=headers, on_delivery=on_delivery)
            else:
                producer.produce(topic, value, key, on_delivery=on_delivery)
        assert producer.flush(60) == 0
        produce_us = 1e6 * (time.process_time() - begun_s) / num
        thread_us = 1e6 * (time.thread_time() - thread_s) / num
        consume_us, num_bytes = _consume(settings, topic, num, consumes)
    return Cost(produce_us, thread_us, consume_us, num_bytes / num)


def _note(error: object, message: object) -> None:
    assert error is None


def _consume(
    settings: Settings, topic: str, num: int, properties: dict[str, str | int]
) -> tuple[float, int]:
    """Microseconds a message, as a poller reads them; and the bytes that were fetched."""
    received: list[int] = []
    read: Callable[[str], None] = lambda text: received.append(json.loads(text)["rx_bytes"])  # noqa: E731
    config: dict[str, Any] = {"group.id": topic, "statistics.interval.ms": 200, "stats_cb": read}
    config |= {"fetch.queue.backoff.ms": 10, **properties}
    consumer: Consumer = make_client(Consumer, client_config(settings, defaults=config))
    consumer.assign([TopicPartition(topic, number, 0) for number in range(_NUM_PARTITIONS)])
    lane = LaneSettings(name="x", rank=1, deadline_ms=1, reserved_share=0, topic=topic)
    first = consume_ready(consumer, 500, 30.0)
    seen = len(records_of(lane, first, 0))
    begun_s, seen_before = time.process_time(), seen
    while seen < num:
        seen += len(records_of(lane, consume_ready(consumer, 500, 1.0), 0))
    used_s = time.process_time() - begun_s
    deadline_s = time.monotonic() + 2
    while time.monotonic() < deadline_s and len(received) < 2:
        consumer.poll(0.1)
    consumer.close()
    return 1e6 * used_s / (num - seen_before), max(received, default=0)


@contextmanager
def _topic(settings: Settings) -> Iterator[str]:
    """A topic of its own."""
    admin = AdminClient({"bootstrap.servers": settings.kafka.bootstrap_servers})
    topic = f"kafka-{uuid.uuid4().hex[:8]}"
    for created in admin.create_topics([NewTopic(topic, _NUM_PARTITIONS, 1)]).values():
        created.result()
    yield topic
    for deleted in admin.delete_topics([topic]).values():
        deleted.result()


if __name__ == "__main__":
    main()
