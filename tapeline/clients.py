"""What the Kafka clients of the face share: a quick check of the broker, offsets, errors."""

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._listoffsets import OffsetSpec

from schemas.errors import ConfigError, TransientError
from schemas.kafka import client_config, make_client
from schemas.settings import Settings, load_settings

CHECK_TIMEOUT_S = 5.0
_CHECK_STEP_S = 0.5
_RETRY_PAUSE_S = 0.05

_DOWN = frozenset((KafkaError._TRANSPORT, KafkaError._RESOLVE, KafkaError._ALL_BROKERS_DOWN))
_REFUSED = frozenset(
    (
        KafkaError._AUTHENTICATION,
        KafkaError._SSL,
        KafkaError.SASL_AUTHENTICATION_FAILED,
        KafkaError.UNSUPPORTED_SASL_MECHANISM,
    )
)
_PASSING = frozenset(
    (
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.UNKNOWN_LEADER_EPOCH,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.REPLICA_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.NOT_COORDINATOR,
    )
)

T = TypeVar("T")


def settings_or_load(settings: Settings | None, overrides: Mapping[str, Any]) -> Settings:
    """The settings given, or those of file and environment with whole or partial sections over."""
    if settings is None:
        return load_settings(**overrides)
    if overrides:
        raise ConfigError(
            f"settings and {', '.join(sorted(overrides))} are both given; give one of the two"
        )
    return settings


def make_admin(settings: Settings) -> AdminClient:
    """An AdminClient; it connects in the background, so this neither blocks nor fails."""
    admin: AdminClient = make_client(AdminClient, client_config(settings))
    return admin


def check_kafka(
    settings: Settings, topics: Iterable[str] = (), *, timeout_s: float = CHECK_TIMEOUT_S
) -> Mapping[str, int]:
    """Asks the broker for its topics; returns how many partitions each one has, by name.

    Blocks for some milliseconds, or up to about ``timeout_s`` if no broker answers.

    Raises:
        ConfigError: no broker answers, it refuses us, or one of ``topics`` does not exist.
    """
    found = _topics(settings, timeout_s)
    missing = [topic for topic in topics if topic not in found]
    if missing:
        raise missing_topic(*missing, settings=settings)
    return found


def list_offsets(
    admin: AdminClient, settings: Settings, partitions: Iterable[TopicPartition], *, latest: bool
) -> dict[tuple[str, int], int]:
    """The first offset of each partition, or the one after its last committed record.

    Blocks for at most kafka.timeout_s. Raises TransientError.
    """
    spec = (OffsetSpec.latest if latest else OffsetSpec.earliest)()  # type: ignore[no-untyped-call]
    wanted = dict.fromkeys(partitions, spec)
    timeout_s = settings.kafka.timeout_s

    def ask() -> dict[tuple[str, int], int]:
        answers = admin.list_offsets(
            wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=timeout_s
        )
        return {
            (one.topic, one.partition): answer.result(timeout_s + 1).offset
            for one, answer in answers.items()
        }

    return ask_broker(ask, "where its topics end" if latest else "where its topics begin", settings)


def ask_broker(ask: Callable[[], T], what: str, settings: Settings) -> T:
    """What ``ask`` returns, asked again while a leader or coordinator is on its way.

    A topic that was just made or a broker that just started needs such a moment. Raises
    TransientError after kafka.timeout_s, and at once for an error that will stay.
    """
    deadline_s = time.monotonic() + settings.kafka.timeout_s
    while True:
        try:
            return ask()
        except KafkaException as error:
            reason = error.args[0]
            if reason.code() not in _PASSING or time.monotonic() >= deadline_s:
                raise TransientError(f"the broker does not say {what}: {reason.str()}") from error
        except FutureTimeoutError as error:
            raise TransientError(
                f"the broker at {settings.kafka.bootstrap_servers} did not say {what} within "
                f"{settings.kafka.timeout_s:g} s; look at its health or raise kafka.timeout_s"
            ) from error
        time.sleep(_RETRY_PAUSE_S)


def missing_topic(*topics: str, settings: Settings) -> ConfigError:
    """The error for topics that do not exist."""
    which = f"topic {topics[0]}" if len(topics) == 1 else f"topics {', '.join(topics)}"
    verb = "does" if len(topics) == 1 else "do"
    where = settings.kafka.bootstrap_servers
    return ConfigError(f"the {which} {verb} not exist at {where}; run `tapeline topics --create`")


def no_broker(settings: Settings) -> ConfigError:
    """The error for an address where no broker answers."""
    return ConfigError(
        f"no Kafka broker answers at {settings.kafka.bootstrap_servers}; start one with "
        "`tapeline up`, or set TAPELINE_KAFKA__BOOTSTRAP_SERVERS"
    )


def _topics(settings: Settings, timeout_s: float) -> Mapping[str, int]:
    errors: list[KafkaError] = []
    config = client_config(settings)
    admin = make_client(AdminClient, config | {"error_cb": errors.append})
    deadline_s = time.monotonic() + timeout_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        try:
            metadata = admin.list_topics(timeout=min(left_s, _CHECK_STEP_S))
        except KafkaException:
            admin.poll(0)  # serves error_cb
        else:
            return {
                name: len(topic.partitions)
                for name, topic in metadata.topics.items()
                if topic.error is None
            }
        if refused := next((error for error in errors if error.code() in _REFUSED), None):
            raise ConfigError(
                f"Kafka at {settings.kafka.bootstrap_servers} refuses the connection: "
                f"{refused.str()}; check the security settings in kafka.client"
            )
        if errors and errors[-1].code() in _DOWN:
            break  # refused or unknown, and not just slow
    raise no_broker(settings)
