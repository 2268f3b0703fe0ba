"""The way out: features to their lane's output topic, dead letters to its DLQ, all acknowledged.

One idempotent producer a worker, so records of a partition stay in the order of ``send``, and an
acknowledgement means that every in-sync replica has the record.
"""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer

from schemas.errors import TransientError
from schemas.kafka import client_config, make_client
from schemas.settings import Settings

_log = structlog.get_logger(__name__)
_QUEUE_FULL_WAIT_S = 0.005
_MAX_MESSAGE_BYTES = 17 * 2**20  # a lane's largest record, 16 MiB, in its dead letter


class Outgoing(NamedTuple):
    """A message to publish."""

    topic: str
    key: bytes | None
    value: bytes
    headers: Sequence[tuple[str, bytes | None]]


class Delivery:
    """The acknowledgement of a group of messages; awaitable, TransientError if one failed."""

    def __init__(self, num_messages: int, loop: asyncio.AbstractEventLoop) -> None:
        self._missing = num_messages
        self._loop = loop
        self._done: asyncio.Future[None] = loop.create_future()
        if not num_messages:
            self._done.set_result(None)

    def __await__(self) -> Any:
        return self._done.__await__()

    def acknowledge(self, error: KafkaError | None, message: Message) -> None:
        """librdkafka's delivery callback; runs in the publisher's thread, one call a message."""
        self._missing -= 1
        if error is not None:
            failure = TransientError(f"{message.topic()} did not take a record: {error.str()}")
            self._loop.call_soon_threadsafe(self._finish, failure)
        elif not self._missing:
            self._loop.call_soon_threadsafe(self._finish, None)

    def _finish(self, failure: TransientError | None) -> None:
        if self._done.done():
            return
        if failure:
            self._done.set_exception(failure)
        else:
            self._done.set_result(None)


class Publisher:
    """The worker's producer and the thread that serves its callbacks."""

    def __init__(self, settings: Settings) -> None:
        self._producer: Producer = make_client(
            Producer,
            client_config(
                settings,
                defaults={
                    "client.id": "tapeline-worker",
                    "linger.ms": 1,
                    "delivery.timeout.ms": int(settings.worker.retry_deadline_s * 1000),
                    "message.max.bytes": _MAX_MESSAGE_BYTES,
                },
                required={
                    "enable.idempotence": True,
                    "acks": "all",
                    "partitioner": "murmur2_random",
                },
            ),
        )
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="publish", daemon=True)
        self._thread.start()

    async def send(self, messages: Sequence[Outgoing]) -> Delivery:
        """Queues messages in order; the Delivery returned completes when all are acknowledged.

        Waits while librdkafka's queue is full. Callers take turns: two sends at once may mix.
        """
        delivery = Delivery(len(messages), asyncio.get_running_loop())
        for message in messages:
            while not self._try_produce(message, delivery):  # noqa: ASYNC110
                await asyncio.sleep(_QUEUE_FULL_WAIT_S)  # librdkafka has no signal for room
        return delivery

    def _try_produce(self, message: Outgoing, delivery: Delivery) -> bool:
        try:
            self._producer.produce(
                message.topic,
                message.value,
                message.key,
                headers=list(message.headers),
                on_delivery=delivery.acknowledge,
            )
        except BufferError:
            return False
        except KafkaException as error:
            raise TransientError(f"{message.topic} did not take a record: {error}") from error
        return True

    def _serve(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(0.1)

    async def close(self, timeout_s: float) -> None:
        """Flushes for at most ``timeout_s`` and ends the thread."""
        self._closing.set()
        await asyncio.to_thread(self._thread.join)
        if left := await asyncio.to_thread(self._producer.flush, timeout_s):
            _log.warning("publisher_closed_unflushed", num_messages=left)
