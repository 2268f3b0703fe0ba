"""The topics of the lanes: which there should be, which there are, and making the difference."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Literal

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._metadata import ClusterMetadata
from confluent_kafka.cimpl import NewTopic

from schemas.errors import ConfigError, TransientError
from schemas.kafka import client_config, make_client
from schemas.settings import Settings
from tapeline.clients import list_offsets

MAX_RECORD_BYTES = 16 * 1024 * 1024
_DLQ_HEADER_BYTES = 1024 * 1024  # on top of the largest record: the headers that say why
_RETRY_PAUSE_S = 0.05

TopicState = Literal["created", "exists", "mismatch", "missing"]


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """One topic as the settings want it."""

    name: str
    num_partitions: int
    replication_factor: int
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TopicStatus:
    """One topic as the cluster has it.

    Attributes:
        num_partitions: the cluster's; 0 while the topic is missing.
        detail: for a mismatch, what differs and how to mend it.
    """

    name: str
    state: TopicState
    num_partitions: int
    detail: str = ""


def lane_topics(settings: Settings) -> list[TopicSpec]:
    """Input, output and dead-letter topic of every enabled lane, first rank first."""
    kafka = settings.kafka

    def spec(name: str, max_record_bytes: int | None, **more: str) -> TopicSpec:
        config = {"message.timestamp.type": "LogAppendTime", **more}
        if max_record_bytes is not None:
            config["max.message.bytes"] = str(max_record_bytes)
        return TopicSpec(name, kafka.num_partitions, kafka.replication_factor, config)

    specs: dict[str, TopicSpec] = {}  # lanes may share an output topic
    for lane in settings.active_lanes:
        specs[lane.topic] = spec(lane.topic, MAX_RECORD_BYTES)
        specs.setdefault(lane.output_topic, spec(lane.output_topic, None))
        # A letter stays until somebody closes it, however long that takes.
        specs[lane.dlq_topic] = spec(
            lane.dlq_topic, MAX_RECORD_BYTES + _DLQ_HEADER_BYTES, **{"retention.ms": "-1"}
        )
    return list(specs.values())


def admin_client(settings: Settings) -> AdminClient:
    """A quiet client: whoever calls it turns what goes wrong into one sentence."""
    quick = {"reconnect.backoff.max.ms": 500}  # or a broker that starts is noticed 10 s late
    admin: AdminClient = make_client(AdminClient, client_config(settings, defaults=quick))
    return admin


def cluster_metadata(
    settings: Settings, *, admin: AdminClient | None = None, timeout_s: float | None = None
) -> ClusterMetadata:
    """Brokers and topics of the cluster. Blocks for at most ``timeout_s`` (kafka.timeout_s).

    Raises:
        ConfigError: nobody answers at kafka.bootstrap_servers.
    """
    timeout_s = settings.kafka.timeout_s if timeout_s is None else timeout_s
    try:
        return (admin or admin_client(settings)).list_topics(timeout=timeout_s)
    except KafkaException as error:
        raise ConfigError(
            f"no Kafka broker answers at {settings.kafka.bootstrap_servers} within {timeout_s:g} s "
            f"({error.args[0].str()}); start one with `tapeline up` or point "
            "TAPELINE_KAFKA__BOOTSTRAP_SERVERS at yours"
        ) from error


def topic_statuses(
    settings: Settings, topics: Sequence[TopicSpec] | None = None
) -> list[TopicStatus]:
    """What the cluster has of ``topics`` (the lanes'); changes nothing.

    Raises ConfigError if no broker answers.
    """
    wanted = lane_topics(settings) if topics is None else topics
    metadata = cluster_metadata(settings)
    return [_status(spec, metadata) for spec in wanted]


def ensure_topics(
    settings: Settings, topics: Sequence[TopicSpec] | None = None
) -> list[TopicStatus]:
    """Creates what is missing of ``topics`` (the lanes') and returns when all can be written to.

    A topic that exists is left as it is; one with another number of partitions is reported as a
    mismatch. Blocks for at most four times kafka.timeout_s.

    Raises:
        ConfigError: no broker answers, or it refuses to create a topic.
        TransientError: the cluster accepted the topics but gave them no leaders in time, or those
            do not answer.
    """
    wanted = lane_topics(settings) if topics is None else topics
    admin = admin_client(settings)
    before = cluster_metadata(settings, admin=admin)
    missing = [spec for spec in wanted if spec.name not in before.topics]
    created = _create(admin, missing, settings.kafka.timeout_s)
    after = _wait_for_leaders(settings, admin, wanted)
    # A leader that is named may not know it yet. It refuses records then, and may take later ones
    # sooner than those sent again (schemas.kafka.Deliveries); so it must answer first.
    partitions = [
        TopicPartition(spec.name, number)
        for spec in wanted
        for number in after.topics[spec.name].partitions
    ]
    list_offsets(admin, settings, partitions, latest=True)
    return [
        TopicStatus(spec.name, "created", spec.num_partitions)
        if spec.name in created
        else _status(spec, after)
        for spec in wanted
    ]


def _create(admin: AdminClient, missing: Sequence[TopicSpec], timeout_s: float) -> set[str]:
    """Names of those that were created now; another process may have been faster with some."""
    if not missing:
        return set()
    futures = admin.create_topics(
        [
            NewTopic(
                spec.name,
                num_partitions=spec.num_partitions,
                replication_factor=spec.replication_factor,
                config=dict(spec.config),
            )
            for spec in missing
        ],
        operation_timeout=timeout_s,
        request_timeout=timeout_s,
    )
    created = set()
    for name, future in futures.items():
        try:
            future.result(timeout_s + 1)
        except FutureTimeoutError as error:
            raise TransientError(f"creating topic {name} took over {timeout_s:g} s") from error
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise _refusal(name, error.args[0]) from error
        else:
            created.add(name)
    return created


def _refusal(name: str, error: KafkaError) -> ConfigError | TransientError:
    mends = {
        KafkaError.INVALID_REPLICATION_FACTOR: "lower TAPELINE_KAFKA__REPLICATION_FACTOR",
        KafkaError.INVALID_PARTITIONS: "change TAPELINE_KAFKA__NUM_PARTITIONS",
        KafkaError.TOPIC_EXCEPTION: "rename the lane's topic in the settings",
        KafkaError.POLICY_VIOLATION: "ask the cluster's owner which topics its policy allows",
        KafkaError.TOPIC_AUTHORIZATION_FAILED: "have it created for you, or get the right to",
        KafkaError.CLUSTER_AUTHORIZATION_FAILED: "have it created for you, or get the right to",
    }
    text = f"the broker refuses to create topic {name}: {error.str()}"
    mend = mends.get(error.code())
    return ConfigError(f"{text}; {mend}") if mend else TransientError(text)


def _wait_for_leaders(
    settings: Settings, admin: AdminClient, wanted: Sequence[TopicSpec]
) -> ClusterMetadata:
    deadline_s = time.monotonic() + settings.kafka.timeout_s
    while True:
        metadata = cluster_metadata(settings, admin=admin)
        leaderless = [spec.name for spec in wanted if not _has_leaders(spec.name, metadata)]
        if not leaderless:
            return metadata
        if time.monotonic() > deadline_s:
            raise TransientError(
                f"{len(leaderless)} topics have no leader after {settings.kafka.timeout_s:g} s, "
                f"the first is {leaderless[0]}; see the broker's log"
            )
        time.sleep(_RETRY_PAUSE_S)


def _has_leaders(name: str, metadata: ClusterMetadata) -> bool:
    with contextlib.suppress(KeyError):
        partitions = metadata.topics[name].partitions.values()
        return bool(partitions) and all(partition.leader >= 0 for partition in partitions)
    return False


def _status(spec: TopicSpec, metadata: ClusterMetadata) -> TopicStatus:
    topic = metadata.topics.get(spec.name)
    if topic is None:
        return TopicStatus(spec.name, "missing", 0, "create it with `tapeline topics --create`")
    found = len(topic.partitions)
    if found == spec.num_partitions:
        return TopicStatus(spec.name, "exists", found)
    return TopicStatus(
        spec.name,
        "mismatch",
        found,
        f"has {found} partitions, the settings say {spec.num_partitions}; "
        f"set TAPELINE_KAFKA__NUM_PARTITIONS={found} or recreate the topic",
    )
