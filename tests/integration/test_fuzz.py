"""Ten thousand records that should not be there, through a real broker and a running worker."""

import ctypes
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition, cimpl
from fuzzing import FINGERPRINT, START_US, RawRecord, encoded, fuzzed, real_events
from pipeline import (
    LONG_S,
    assert_once_and_in_order,
    features,
    produce,
    running_worker,
)
from waiting import wait_until

from consumers.channels import Market50
from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.codec import FINGERPRINT_HEADER, Codec
from schemas.errors import PoisonRecord
from schemas.messages import DeadLetter, MarketEvent
from schemas.settings import SchemaRegistrySettings, Settings
from tapeline.simulator import simulate, symbol_names

MakeSettings = Callable[..., Settings]
CODEC = Codec(SchemaRegistrySettings())
NUM_FUZZED = 10_000
NUM_GOOD = 2_000
NUM_SYMBOLS = 4
NUM_ROUNDS = 20  # of fuzzed records, each with good events behind it
LANE = "realtime"
FEARLESS = {"dlq_max_ratio": 1.0, "dlq_max_consecutive": 1_000_000}


@pytest.fixture(scope="module")
def small_engine() -> Engine:
    config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1)
    return Engine(seeded_artifact(config=config), device="cpu", max_batch=256)


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_fuzzed_records_are_letters_or_events_and_the_good_ones_unharmed(
    make_settings: MakeSettings, small_engine: Engine, delivery: str
) -> None:
    settings = make_settings(worker={**FEARLESS, "delivery": delivery})
    sent = list(fuzzed(encoded(real_events(60)), NUM_FUZZED, seed=3))
    poison = [record for record in sent if is_poison(record)]
    assert NUM_FUZZED // 4 < len(poison) < NUM_FUZZED - NUM_FUZZED // 10, "some of both"
    good = good_events()
    with running_worker(settings, small_engine) as worker:
        for turn in range(NUM_ROUNDS):
            send(settings, sent[turn::NUM_ROUNDS], seed=turn)
            part = NUM_GOOD // NUM_ROUNDS
            produce(settings, good[turn * part : (turn + 1) * part], LANE)
        counts = worker.wait_until_ended(LANE, NUM_FUZZED + NUM_GOOD)
        received = features(settings, counts.features)
    assert counts.records == NUM_FUZZED + NUM_GOOD
    assert counts.dead_letters == len(poison)
    ended = counts.features + counts.warm_up + counts.duplicates
    assert ended == NUM_FUZZED + NUM_GOOD - len(poison)
    assert len(received) == counts.features
    assert_once_and_in_order(received)
    of_good = [record.feature for record in received if record.feature.venue == good[0].venue]
    assert {one.event_id for one in of_good} == events_with_features(good)

    letters = dead_letters(settings, len(poison))
    assert sorted(map(_contents, letters)) == sorted(map(_contents, poison))
    assert len({(one.source_partition, one.source_offset) for one in letters}) == len(poison)


def test_a_letter_is_never_too_large_for_the_broker(
    make_settings: MakeSettings, small_engine: Engine
) -> None:
    """Not even where what is wrong is megabytes long, and none of it may be printed."""
    settings = make_settings(worker={**FEARLESS, "max_message_bytes": 2**23})
    length = 5 * 2**20
    text = bytes([length << 1 & 0x7F | 0x80, length >> 6 & 0x7F | 0x80, length >> 13 & 0x7F | 0x80])
    text += bytes([length >> 20]) + b"\xff" * length
    (valid,) = encoded(good_events()[:1])
    records = [
        RawRecord(text, FINGERPRINT),
        RawRecord(valid.value[10:], [(FINGERPRINT_HEADER, b"\xff" * length)]),
    ]
    with running_worker(settings, small_engine) as worker:
        send(settings, records, seed=0)
        worker.wait_until_ended(LANE, len(records))
        letters = dead_letters(settings, len(records))
    assert sorted(map(_contents, letters)) == sorted(map(_contents, records))


def test_a_header_whose_name_is_no_text(make_settings: MakeSettings, small_engine: Engine) -> None:
    """Other clients may send one; confluent-kafka cannot, and fails on reading it."""
    settings = make_settings(worker=FEARLESS)
    good = good_events()
    with running_worker(settings, small_engine) as worker:
        produce(settings, good[:1_000], LANE)
        send_header_name(settings, b"\xff\xfe")
        produce(settings, good[1_000:], LANE)
        counts = worker.wait_until_ended(LANE, len(good) + 1)
        received = features(settings, counts.features)
    assert counts.dead_letters == 1
    assert {one.feature.event_id for one in received} == events_with_features(good)


def good_events() -> list[MarketEvent]:
    tape = simulate(
        symbols=symbol_names(NUM_SYMBOLS), seed=5, start_time_us=START_US, num_events=NUM_GOOD
    )
    return list(tape)


def events_with_features(events: list[MarketEvent]) -> set[str]:
    """Ids of all but each symbol's first 59."""
    seen: dict[str, int] = {}
    ids = set()
    for event in events:
        seen[event.symbol] = seen.get(event.symbol, 0) + 1
        if seen[event.symbol] >= 60:
            ids.add(event.event_id)
    return ids


def is_poison(record: RawRecord) -> bool:
    """What the records themselves say, asked without a worker."""
    try:
        Market50().check(CODEC.decode_event(record.value, record.headers))
    except PoisonRecord:
        return True
    return False


def send(settings: Settings, records: list[RawRecord], *, seed: int) -> None:
    """With keys of all kinds, so to all partitions."""
    random = Random(seed)
    producer = Producer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "message.max.bytes": 12_000_000,
            "acks": "all",
        }
    )
    topic = settings.lane(LANE).topic
    for value, headers in records:
        key = random.choice([None, b"", random.randbytes(8), b"SIM01", b"\xff" * 2_000])
        producer.produce(topic, value, key, headers=list(headers))
        producer.poll(0)
    assert producer.flush(LONG_S) == 0


def dead_letters(settings: Settings, num_letters: int) -> list[DeadLetter]:
    """All of the lane's, committed ones only."""
    lane = settings.lane(LANE)
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": f"{lane.dlq_topic}.reader",
            "auto.offset.reset": "earliest",
            "isolation.level": "read_committed",
        }
    )
    partitions = range(settings.kafka.num_partitions)
    consumer.assign([TopicPartition(lane.dlq_topic, number, 0) for number in partitions])
    letters: list[DeadLetter] = []

    def enough() -> bool:
        for message in consumer.consume(500, 0.2):
            assert message.error() is None
            letters.append(CODEC.decode_dead_letter(message.value(), message.headers()))
        return len(letters) >= num_letters

    try:
        wait_until(enough, LONG_S, f"{num_letters} letters")
    except TimeoutError as error:
        by_source = Counter(one.source_partition for one in letters)
        error.add_note(f"{len(letters)} came, by source's partition {by_source}")
        for place in consumer.position([TopicPartition(lane.dlq_topic, one) for one in partitions]):
            first, end = consumer.get_watermark_offsets(place, LONG_S)
            error.add_note(f"partition {place.partition}: at {place.offset} of {first} to {end}")
        raise
    finally:
        consumer.close()
    return letters


def _contents(record: RawRecord | DeadLetter) -> tuple[bytes, str]:
    """Value and headers in a form that can be sorted; names end at a NUL, as Kafka's clients do."""
    headers = [(name.partition("\0")[0], value) for name, value in record.headers]
    return record.value or b"none", repr(headers)


def send_header_name(settings: Settings, name: bytes) -> None:
    """One record with such a header, by the C library itself: the Python around it wants text."""
    library = ctypes.CDLL(cimpl.__file__)
    for function in ("conf_new", "new", "headers_new"):
        getattr(library, f"rd_kafka_{function}").restype = ctypes.c_void_p
    error = ctypes.create_string_buffer(512)
    conf = ctypes.c_void_p(library.rd_kafka_conf_new())
    servers = settings.kafka.bootstrap_servers.encode()
    library.rd_kafka_conf_set(conf, b"bootstrap.servers", servers, error, 512)
    producer = ctypes.c_void_p(library.rd_kafka_new(0, conf, error, 512))
    headers = ctypes.c_void_p(library.rd_kafka_headers_new(1))
    size = ctypes.c_ssize_t
    library.rd_kafka_header_add(headers, name, size(len(name)), b"x", size(1))
    topic, end, with_topic, with_headers = settings.lane(LANE).topic.encode(), 0, 1, 10
    assert not library.rd_kafka_producev(
        producer, with_topic, ctypes.c_char_p(topic), with_headers, headers, end
    )
    assert not library.rd_kafka_flush(producer, int(LONG_S * 1000))
    library.rd_kafka_destroy(producer)
