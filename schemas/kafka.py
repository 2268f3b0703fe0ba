"""librdkafka's configuration, the same for every client of ours.

Its own log lines go to the logger ``librdkafka`` and nowhere else unless that is configured.
"""

import logging
import math
import time
from collections.abc import Iterable, Mapping
from operator import methodcaller
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Message

from schemas.errors import ConfigError
from schemas.messages import Headers
from schemas.settings import Settings

IDEMPOTENT: Mapping[str, Any] = {
    "enable.idempotence": True,
    "acks": "all",
    "partitioner": "murmur2_random",
}
"""What every producer of ours must be: no repeats, all in-sync replicas, the Java client's keys."""
_KNOWN_FOR_S = 3600.0  # a broker forgets a producer that is silent for a day

LOGGER = logging.getLogger("librdkafka")
LOGGER.addHandler(logging.NullHandler())  # or Python prints warnings to stderr for want of one


def client_config(
    settings: Settings,
    *,
    defaults: Mapping[str, Any] | None = None,
    required: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """librdkafka's configuration: ``defaults``, over them the user's ``kafka.client``, then ours.

    Args:
        required: what a contract of ours depends on. Raises ConfigError if the user's map says
            something else.
    """
    required = required or {}
    for key, value in required.items():
        given = settings.kafka.client.get(key, value)
        if str(given).lower() != str(value).lower():
            raise ConfigError(
                f"settings: kafka.client: {key} cannot be {given!r}, for Tapeline depends on "
                f"{value!r}; remove it"
            )
    return {
        "client.id": "tapeline",
        **(defaults or {}),
        **settings.kafka.client,
        **required,
        "bootstrap.servers": settings.kafka.bootstrap_servers,
        "logger": LOGGER,
    }


def make_client(kind: Any, config: Mapping[str, Any]) -> Any:
    """A librdkafka client of that class. Raises ConfigError for a property that it refuses."""
    try:
        return kind(dict(config))
    except KafkaException as error:
        reason = error.args[0].str()
        raise ConfigError(f"settings: kafka.client: {reason}") from error


class Deliveries:
    """What one producer's delivery callbacks have to take for the outcome of each message.

    A broker before Kafka 4.5 may refuse a producer's first request to a partition, while its leader
    is on its way, and take the second one, sent meanwhile (KAFKA-15591). The records of the first
    are lost then, and librdkafka says that they were delivered, but at no offset. It says the same
    of records that it sent twice, because an answer was lost with a broker: those are there. A
    broker that knows the producer by what it has in the partition already refuses the second
    request, too; so what was produced after such an acknowledgement is there.
    """

    def __init__(self) -> None:
        self._known_s: dict[tuple[str | None, int | None], tuple[float, float]] = {}
        """Since when, and when last, the broker gave offsets in a partition."""

    def error(self, error: KafkaError | None, message: Message) -> KafkaError | None:
        """None once the broker has the record. Call it in the callback: it looks at the clock."""
        if error is not None:
            return error
        now_s = time.monotonic()
        place = message.topic(), message.partition()
        since_s, last_s = self._known_s.get(place, (math.inf, -math.inf))
        if message.offset() is not None:
            is_anew = now_s - last_s > _KNOWN_FOR_S
            self._known_s[place] = (now_s if is_anew else since_s, now_s)
            return None
        latency_s = message.latency()
        produced_s = -math.inf if latency_s is None else now_s - latency_s
        if since_s < produced_s < last_s + _KNOWN_FOR_S:
            return None
        return KafkaError(
            KafkaError.OUT_OF_ORDER_SEQUENCE_NUMBER,
            "the broker took later records and perhaps not this one",
        )


_call_headers = methodcaller("headers")


def message_headers(message: Any) -> Headers:
    """A polled message's headers; none where a name is not UTF-8.

    confluent-kafka 2.16 then returns a broken list beside a pending error. Only an indirect call
    notices; whoever touches that list, or asks for it again, crashes the process.
    """
    try:
        headers: Headers | None = _call_headers(message)
    except (SystemError, UnicodeDecodeError):
        return ()
    return headers or ()


def all_headers(messages: Iterable[Any]) -> list[Headers]:
    """``message_headers`` of each, sooner."""
    found: list[Headers | None] = []
    asked = map(_call_headers, messages)
    while True:
        try:
            found.extend(asked)
        except (SystemError, UnicodeDecodeError):  # of the next one; those before it are there
            found.append(())
        else:
            return [headers or () for headers in found]


def consume_ready(consumer: Any, max_messages: int, timeout_s: float) -> list[Any]:
    """Waits up to ``timeout_s`` for one message and takes those behind it, up to ``max_messages``.

    Asking for many at once would wait all of the time unless so many arrive.
    """
    messages: list[Any] = consumer.consume(1, timeout_s)
    if messages:
        messages += consumer.consume(max_messages - 1, 0)
    return messages
