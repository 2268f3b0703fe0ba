"""How far the workers of each lane are behind, asked of the broker."""

from collections.abc import Sequence
from dataclasses import dataclass

from confluent_kafka import Consumer, TopicPartition

from consumers.offsets import decode_metadata
from schemas.kafka import client_config, make_client
from schemas.lanes import LaneSettings
from schemas.settings import Settings
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
        commits = _commits(settings, lane, num_partitions[lane.topic])
        for partition in range(num_partitions[lane.topic]):
            where = (lane.topic, partition)
            committed, replay_from = commits.get(partition, (None, None))
            begin = first[where] if committed is None else max(committed, first[where])
            lag = max(0, end[where] - begin)
            lags.append(PartitionLag(lane.name, *where, committed, replay_from, end[where], lag))
    return lags


def _commits(
    settings: Settings, lane: LaneSettings, num_partitions: int
) -> dict[int, tuple[int, int]]:
    """Partition to (committed offset, replay offset), where the lane's group has committed.

    Asked by a consumer that never joins the group: the AdminClient's way to ask crashes the process
    while the group's coordinator is on its way (librdkafka issue 5040).
    """
    required = {"group.id": lane.group, "enable.auto.commit": False}
    consumer: Consumer = make_client(Consumer, client_config(settings, required=required))
    partitions = [TopicPartition(lane.topic, partition) for partition in range(num_partitions)]
    try:
        committed = ask_broker(
            lambda: consumer.committed(partitions, timeout=settings.kafka.timeout_s),
            f"what group {lane.group} has committed",
            settings,
        )
    finally:
        consumer.close()
    return {
        one.partition: (one.offset, decode_metadata(one.metadata, one.offset))
        for one in committed
        if one.offset >= 0
    }
