"""The way out, at least once: one idempotent producer a worker, for all lanes.

Records of a partition stay in the order of ``send``, and an acknowledgement means that every
in-sync replica has the record. Offsets are committed afterwards, by the pollers.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from consumers.parcels import Outgoing, Parcel
from schemas.errors import TransientError
from schemas.kafka import IDEMPOTENT, Deliveries, client_config, make_client
from schemas.settings import Settings

_log = structlog.get_logger(__name__)
_QUEUE_FULL_WAIT_S = 0.005
_SERVE_EVERY_S = 0.001
OnDelivery = Callable[[KafkaError | None, Message], None]
_MAX_MESSAGE_BYTES = 17 * 2**20  # a lane's largest record, 16 MiB, in its dead letter


def make_producer(settings: Settings, config: Mapping[str, Any]) -> Producer:
    """A producer of a worker, idempotent, acknowledged by all in-sync replicas."""
    producer: Producer = make_client(
        Producer,
        client_config(
            settings,
            defaults={
                "client.id": "tapeline-worker",
                "message.max.bytes": _MAX_MESSAGE_BYTES,
                **config,
            },
            required=IDEMPOTENT,
        ),
    )
    return producer


def try_produce(
    producer: Producer, message: Outgoing, on_delivery: OnDelivery | None = None
) -> bool:
    """Puts a message into librdkafka's queue; False while that is full. Raises TransientError."""
    topic, key, value, headers = message
    try:
        if headers:
            producer.produce(topic, value, key, headers=list(headers), on_delivery=on_delivery)
        else:  # an empty list would cost as much as a header
            producer.produce(topic, value, key, on_delivery=on_delivery)
    except BufferError:
        return False
    except KafkaException as error:
        raise TransientError(f"{topic} did not take a record: {error}") from error
    return True


class _Acknowledgements:
    """Counts those of one parcel, and resolves it."""

    def __init__(self, parcel: Parcel, deliveries: Deliveries) -> None:
        self._deliveries = deliveries
        self._delivered = parcel.delivered
        self._missing = len(parcel.messages)

    def note(self, error: KafkaError | None, message: Message) -> None:
        """librdkafka's delivery callback, one call a message."""
        self._missing -= 1
        if (error := self._deliveries.error(error, message)) is not None:
            if not self._delivered.done():  # its first failure counts
                text = f"{message.topic()} did not take a record: {error.str()}"
                self._delivered.set_exception(TransientError(text))
        elif not self._missing and not self._delivered.done():
            self._delivered.set_result(True)


class Publisher:
    """The outlet of ``at_least_once``: a producer, whose callbacks the event loop serves.

    A thread of their own would take Python's lock for each of them, and the loop would have to
    wait for it to give that back.
    """

    def __init__(self, settings: Settings) -> None:
        self._producer = make_producer(
            settings,
            {
                "linger.ms": 1,
                "delivery.timeout.ms": int(settings.worker.retry_deadline_s * 1000),
            },
        )
        self._deliveries = Deliveries()
        self._sent = asyncio.Event()

    async def open(self) -> None:
        """Nothing to do: the producer connects by itself."""

    async def run(self) -> None:
        """Serves the callbacks, as long as any are to come."""
        while True:
            await self._sent.wait()
            self._producer.poll(0)
            if not len(self._producer):
                self._sent.clear()
            else:
                await asyncio.sleep(_SERVE_EVERY_S)

    async def send(self, parcel: Parcel) -> None:
        """Queues the messages in order. Waits while librdkafka's queue is full.

        ``delivered`` fails with TransientError if one is not acknowledged in time.
        """
        if not parcel.messages:
            parcel.delivered.set_result(True)
            return
        on_delivery = _Acknowledgements(parcel, self._deliveries).note
        for message in parcel.messages:
            while not try_produce(self._producer, message, on_delivery):  # noqa: ASYNC110
                await asyncio.sleep(_QUEUE_FULL_WAIT_S)  # librdkafka has no signal for room
        self._sent.set()

    async def close(self, timeout_s: float) -> None:
        """Flushes for at most ``timeout_s``."""
        give_up_s = time.monotonic() + timeout_s
        while left := len(self._producer):
            if time.monotonic() > give_up_s:
                _log.warning("publisher_closed_unflushed", num_messages=left)
                return
            self._producer.poll(0)
            await asyncio.sleep(_SERVE_EVERY_S)
