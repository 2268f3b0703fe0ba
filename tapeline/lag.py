"""How far the workers of each lane are behind, asked of the broker."""

from collections.abc import Sequence
from dataclasses import dataclass

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from consumers.offsets import decode_metadata
from schemas.settings import LaneSettings, Settings
from tapeline.clients import ask_broker, check_kafka, list_offsets, make_admin


@dataclass(frozen=True, slots=True)
class PartitionLag:
    """One partition of one lane.

    Attributes:
        committed: the next offset to read; None if the lane's group has committed none.
        replay_from: where a restart would begin to rebuild windows; None like ``committed``.
        end: the offset after the last readable record.
        lag: records between the two; counted from the first one where nothing is committed.
    """

    lane: str
    topic: str
    partition: int
    committed: int | None
    replay_from: int | None
    end: int
    lag: int


def lane_lags(
    settings: Settings, lanes: Sequence[LaneSettings] | None = None
) -> list[PartitionLag]:
    """Every partition of the lanes (all enabled ones), first rank first.

    Blocks for some milliseconds a lane, or until kafka.timeout_s.

    Raises:
        ConfigError: no broker answers, or a lane's topic does not exist.
        TransientError: the broker answers, but not this.
    """
    lanes = settings.active_lanes if lanes is None else lanes
    num_partitions = check_kafka(settings, [lane.topic for lane in lanes])
    partitions = [
        TopicPartition(lane.topic, partition)
        for lane in lanes
        for partition in range(num_partitions[lane.topic])
    ]
    admin = make_admin(settings)
    first = list_offsets(admin, settings, partitions, latest=False)
    end = list_offsets(admin, settings, partitions, latest=True)
    lags = []
    for lane in lanes:
        commits = _commits(admin, settings, lane)
        for partition in range(num_partitions[lane.topic]):
            where = (lane.topic, partition)
            committed, replay_from = commits.get(partition, (None, None))
            begin = first[where] if committed is None else max(committed, first[where])
            lag = max(0, end[where] - begin)
            lags.append(PartitionLag(lane.name, *where, committed, replay_from, end[where], lag))
    return lags


def _commits(
    admin: AdminClient, settings: Settings, lane: LaneSettings
) -> dict[int, tuple[int, int]]:
    """Partition to (committed offset, replay offset), where the lane's group has committed."""
    timeout_s = settings.kafka.timeout_s
    request = [ConsumerGroupTopicPartitions(lane.group)]

    def ask() -> Sequence[TopicPartition]:
        answers = admin.list_consumer_group_offsets(request, request_timeout=timeout_s)
        try:
            found = answers[lane.group].result(timeout_s + 1)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                return ()
            raise
        return found.topic_partitions or ()

    committed = ask_broker(ask, f"what group {lane.group} has committed", settings)
    return {
        one.partition: (one.offset, decode_metadata(one.metadata, one.offset))
        for one in committed
        if one.topic == lane.topic and one.offset >= 0
    }
