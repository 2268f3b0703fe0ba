"""``tapeline audit`` against a real worker's books, and against books that were tampered with."""

import json
from collections.abc import Callable

import pytest
from confluent_kafka import Consumer, Message, Producer
from pipeline import LONG_S, produce, running_worker
from typer.testing import CliRunner
from waiting import wait_until

from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.codec import Codec
from schemas.messages import MarketEvent
from schemas.settings import Settings, as_environment
from tapeline.audit import audit
from tapeline.cli import app
from tapeline.simulator import simulate, symbol_names

MakeSettings = Callable[..., Settings]
LANE = "realtime"
NUM_EVENTS, NUM_SYMBOLS = 400, 3


@pytest.fixture(scope="module")
def engine() -> Engine:
    config = ModelConfig(conv_channels=(16,), lstm_hidden=16, lstm_layers=1)
    return Engine(seeded_artifact(config=config), device="cpu", max_batch=64)


def simulated(num_events: int) -> list[MarketEvent]:
    return list(
        simulate(
            symbols=symbol_names(NUM_SYMBOLS),
            seed=7,
            start_time_us=1_700_000_000_000_000,
            num_events=num_events,
        )
    )


@pytest.fixture
def worked_off(settings: Settings, engine: Engine) -> Settings:
    """A lane that a worker has worked off: events, a duplicate and a poison record."""
    events = simulated(NUM_EVENTS)
    with running_worker(settings, engine) as worker:
        produce(settings, [*events, events[0]], LANE)
        send(settings, settings.lane(LANE).topic, b"no Avro at all", [])
        worker.wait_until_ended(LANE, NUM_EVENTS + 2)
    return settings


def send(
    settings: Settings, topic: str, value: bytes, headers: list[tuple[str, bytes]], key: str = "S"
) -> None:
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    producer.produce(topic, value, key=key, headers=headers)
    assert producer.flush(LONG_S) == 0


def send_and_abort(settings: Settings, topic: str, message: Message) -> None:
    """Leaves an aborted record and a transaction's mark on the topic."""
    producer = Producer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "transactional.id": f"{topic}.aborted",
        }
    )
    producer.init_transactions(LONG_S)
    producer.begin_transaction()
    producer.produce(topic, message.value(), key=message.key(), headers=message.headers())
    producer.flush(LONG_S)
    producer.abort_transaction(LONG_S)


def first_message(settings: Settings, topic: str) -> Message:
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": f"{topic}.reader",
            "auto.offset.reset": "earliest",
        }
    )
    try:
        consumer.subscribe([topic])
        return wait_until(lambda: consumer.poll(0.1), LONG_S, f"a record of {topic}")
    finally:
        consumer.close()


def test_what_a_worker_did_is_clean(worked_off: Settings) -> None:
    report = audit(worked_off, settled=True)
    assert report.is_clean, report.first_violation
    lane = next(one for one in report.lanes if one.lane == LANE)
    assert lane.records == NUM_EVENTS + 2
    assert lane.warm_up == 59 * NUM_SYMBOLS
    assert lane.owed == lane.features == NUM_EVENTS - 59 * NUM_SYMBOLS
    assert (lane.duplicates, lane.dead_letters) == (1, 1)
    assert (lane.optional, lane.pending, lane.unprovable, lane.repeats) == (0, 0, 0, 0)
    assert report.num_read == lane.records + lane.features + lane.dead_letters


def test_forged_feature_and_lost_record_are_seen(worked_off: Settings) -> None:
    settings, lane = worked_off, worked_off.lane(LANE)
    forged = first_message(settings, lane.output_topic)
    event_id = (
        Codec(settings.schema_registry).decode_feature(forged.value(), forged.headers()).event_id
    )
    send(settings, lane.output_topic, forged.value(), forged.headers(), forged.key().decode())

    report = audit(settings, [LANE], settled=True)
    assert report.is_clean, "at least once allows a repeat with the same bits"
    assert report.duplicates == (event_id,)
    assert report.lanes[0].repeats == 1
    report = audit(settings, [LANE], delivery="exactly_once")
    assert report.first_violation is not None
    assert (report.first_violation.kind, report.first_violation.event_id) == ("twice", event_id)

    unseen = simulated(NUM_EVENTS + 1)[-1]
    produce(settings, [unseen], LANE)
    assert audit(settings, [LANE]).lanes[0].pending == 1
    report = audit(settings, [LANE], settled=True)
    assert [(one.kind, one.event_id) for one in report.violations] == [("lost", unseen.event_id)]
    assert f"{lane.topic}:" in report.violations[0].sentence


def test_aborted_records_are_not_seen(worked_off: Settings) -> None:
    """And the marks of transactions, at the very ends, do not keep the reader waiting."""
    lane = worked_off.lane(LANE)
    for topic in (lane.topic, lane.output_topic, lane.dlq_topic):
        send_and_abort(worked_off, topic, first_message(worked_off, topic))
    report = audit(worked_off, [LANE], settled=True, delivery="exactly_once")
    assert report.is_clean, report.first_violation
    assert report.lanes[0].records == NUM_EVENTS + 2


def test_strangers_on_the_topics_are_seen_and_receipts_are_not(worked_off: Settings) -> None:
    lane = worked_off.lane(LANE)
    send(worked_off, lane.dlq_topic, b"", [("dlq-receipt", b"0")])
    assert audit(worked_off, [LANE]).is_clean
    send(worked_off, lane.output_topic, b"no feature", [])
    send(worked_off, lane.dlq_topic, b"no letter", [])
    report = audit(worked_off, [LANE])
    assert [one.kind for one in report.violations] == ["lineage", "lineage"]
    assert {one.source.topic for one in report.violations} == {lane.output_topic, lane.dlq_topic}


def test_command_says_what_is_wrong(worked_off: Settings) -> None:
    lane = worked_off.lane(LANE)

    def run(*arguments: str, code: int) -> str:
        command = ["audit", *arguments]
        result = CliRunner().invoke(app, command, env=as_environment(worked_off))
        assert result.exit_code == code, result.output
        return result.output

    assert "clean" in run("--settled", code=0)
    assert json.loads(run("--lane", LANE, "--json", code=0))["clean"] is True
    send(worked_off, lane.output_topic, b"no feature", [])
    assert "is no feature" in run("--lane", LANE, code=1)
    found = json.loads(run("--lane", LANE, "--json", "--delivery", "exactly_once", code=1))
    assert (found["clean"], found["delivery"]) == (False, "exactly_once")
    assert found["violations"][0]["kind"] == "lineage"
    assert found["violations"][0]["source"].startswith(lane.output_topic)
    assert "did you mean" in run("--lane", "realtim", code=2)
