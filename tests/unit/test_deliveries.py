"""Which of the messages that librdkafka calls delivered the broker has. Messages are stand-ins."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from confluent_kafka import KafkaError

from schemas import kafka
from schemas.kafka import Deliveries


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    now = SimpleNamespace(s=1_000.0)
    monkeypatch.setattr(kafka, "time", SimpleNamespace(monotonic=lambda: now.s))
    assert time.monotonic() != now.s
    return now


def message(offset: int | None, latency_s: float = 0.0, partition: int = 0) -> Any:
    return SimpleNamespace(
        topic=lambda: "t",
        partition=lambda: partition,
        offset=lambda: offset,
        latency=lambda: latency_s,
    )


def test_an_error_is_an_error_and_an_offset_is_none() -> None:
    deliveries, error = Deliveries(), KafkaError(KafkaError._MSG_TIMED_OUT)
    assert deliveries.error(error, message(None)) is error
    assert deliveries.error(None, message(7)) is None


def test_without_an_offset_a_partitions_first_records_are_lost(clock: SimpleNamespace) -> None:
    """Also when the answer to later ones comes first."""
    deliveries = Deliveries()
    assert deliveries.error(None, message(None)) is not None
    assert deliveries.error(None, message(3)) is None
    clock.s += 0.5
    assert deliveries.error(None, message(None, latency_s=0.6)) is not None, "produced before"
    assert deliveries.error(None, message(None, latency_s=0.1, partition=1)) is not None


def test_what_was_produced_after_an_offset_is_there_without_one(clock: SimpleNamespace) -> None:
    """It was sent twice, and the broker had it already."""
    deliveries = Deliveries()
    deliveries.error(None, message(3))
    clock.s += 5
    assert deliveries.error(None, message(None, latency_s=4.0)) is None


def test_a_producer_that_was_silent_for_long_may_be_forgotten(clock: SimpleNamespace) -> None:
    deliveries = Deliveries()
    deliveries.error(None, message(3))
    clock.s += 4_000
    assert deliveries.error(None, message(None, latency_s=1.0)) is not None
    deliveries.error(None, message(9))
    clock.s += 1
    assert deliveries.error(None, message(None, latency_s=2.0)) is not None
    assert deliveries.error(None, message(None, latency_s=0.5)) is None
