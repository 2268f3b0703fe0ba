"""The way out, at least once: one idempotent producer a worker, for all lanes.

Records of a partition stay in the order of ``send``, and an acknowledgement means that every
in-sync replica has the record. Offsets are committed afterwards, by the pollers.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from consumers.parcels import Outgoing, Parcel
from schemas.errors import TransientError
from schemas.kafka import IDEMPOTENT, client_config, make_client
from schemas.settings import Settings

_log = structlog.get_logger(__name__)
_QUEUE_FULL_WAIT_S = 0.005
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
    """Counts those of one parcel; lives in the publisher's thread."""

    def __init__(self, parcel: Parcel, done: list[tuple[Parcel, TransientError | None]]) -> None:
        self._parcel = parcel
        self._missing = len(parcel.messages)
        self._done = done

    def note(self, error: KafkaError | None, message: Message) -> None:
        """librdkafka's delivery callback, one call a message."""
        self._missing -= 1
        if error is not None:
            text = f"{message.topic()} did not take a record: {error.str()}"
            self._done.append((self._parcel, TransientError(text)))
        elif not self._missing:
            self._done.append((self._parcel, None))


class Publisher:
    """The outlet of ``at_least_once``: a producer and the thread that serves its callbacks."""

    def __init__(self, settings: Settings) -> None:
        self._producer = make_producer(
            settings,
            {
                "linger.ms": 1,
                "delivery.timeout.ms": int(settings.worker.retry_deadline_s * 1000),
            },
        )
        self._loop = asyncio.get_running_loop()
        self._done: list[tuple[Parcel, TransientError | None]] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="publish", daemon=True)

    async def open(self) -> None:
        self._thread.start()

    async def run(self) -> None:
        """Nothing to do here: the thread does it."""

    async def send(self, parcel: Parcel) -> None:
        """Queues the messages in order. Waits while librdkafka's queue is full.

        ``delivered`` fails with TransientError if one is not acknowledged in time.
        """
        if not parcel.messages:
            parcel.delivered.set_result(True)
            return
        on_delivery = _Acknowledgements(parcel, self._done).note
        for message in parcel.messages:
            while not try_produce(self._producer, message, on_delivery):  # noqa: ASYNC110
                await asyncio.sleep(_QUEUE_FULL_WAIT_S)  # librdkafka has no signal for room

    def _serve(self) -> None:
        """The thread: one hand-over to the loop for all acknowledgements of one poll."""
        while not self._closing.is_set():
            self._producer.poll(0.1)
            if self._done:
                done, self._done[:] = self._done[:], []
                self._loop.call_soon_threadsafe(_resolve, done)

    async def close(self, timeout_s: float) -> None:
        """Flushes for at most ``timeout_s`` and ends the thread."""
        self._closing.set()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)
        if left := await asyncio.to_thread(self._producer.flush, timeout_s):
            _log.warning("publisher_closed_unflushed", num_messages=left)


def _resolve(done: list[tuple[Parcel, TransientError | None]]) -> None:
    for parcel, failure in done:
        if parcel.delivered.done():
            continue  # its first failure counts
        if failure:
            parcel.delivered.set_exception(failure)
        else:
            parcel.delivered.set_result(True)
