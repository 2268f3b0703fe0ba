"""How far the workers of each lane are behind, asked of the broker."""

import time
from collections.abc import Sequence
from contextlib import closing
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


class LagReader:
    """Asks again and again, over the same connections. Close it.

    A lane's commits are asked for by a consumer that never joins the group: the AdminClient's way
    to ask crashes the process while the group's coordinator is on its way (librdkafka issue 5040).

    Attributes:
        ended_s: when the last ends were told, on the monotonic clock.

    Raises ConfigError: no broker answers, or a lane's topic does not exist.
    """

    def __init__(self, settings: Settings, lanes: Sequence[LaneSettings] | None = None) -> None:
        self._settings = settings
        self._lanes = settings.active_lanes if lanes is None else lanes
        found = check_kafka(settings, [lane.topic for lane in self._lanes])
        self._num_partitions = {lane.name: found[lane.topic] for lane in self._lanes}
        self._admin = make_admin(settings)
        self._consumers = {lane.name: self._consumer(lane) for lane in self._lanes}
        self.ended_s = 0.0

    def read(self) -> list[PartitionLag]:
        """Every partition of the lanes, first rank first.

        Blocks for some milliseconds a lane, or until kafka.timeout_s. Raises TransientError: the
        broker does not answer this.
        """
        partitions = [
            TopicPartition(lane.topic, partition)
            for lane in self._lanes
            for partition in range(self._num_partitions[lane.name])
        ]
        first = list_offsets(self._admin, self._settings, partitions, latest=False)
        end = list_offsets(self._admin, self._settings, partitions, latest=True)
        self.ended_s = time.monotonic()
        lags = []
        for lane in self._lanes:
            commits = self._commits(lane)
            for partition in range(self._num_partitions[lane.name]):
                where = (lane.topic, partition)
                committed, replay_from = commits.get(partition, (None, None))
                begin = first[where] if committed is None else max(committed, first[where])
                lag = max(0, end[where] - begin)
                lags.append(
                    PartitionLag(lane.name, *where, committed, replay_from, end[where], lag)
                )
        return lags

    def close(self) -> None:
        for consumer in self._consumers.values():
            consumer.close()

    def _consumer(self, lane: LaneSettings) -> Consumer:
        required = {"group.id": lane.group, "enable.auto.commit": False}
        consumer: Consumer = make_client(Consumer, client_config(self._settings, required=required))
        return consumer

    def _commits(self, lane: LaneSettings) -> dict[int, tuple[int, int]]:
        """Partition to (committed offset, replay offset), where the lane's group has committed."""
        partitions = [
            TopicPartition(lane.topic, partition)
            for partition in range(self._num_partitions[lane.name])
        ]
        timeout_s = self._settings.kafka.timeout_s
        committed = ask_broker(
            lambda: self._consumers[lane.name].committed(partitions, timeout=timeout_s),
            f"what group {lane.group} has committed",
            self._settings,
        )
        return {
            one.partition: (one.offset, decode_metadata(one.metadata, one.offset))
            for one in committed
            if one.offset >= 0
        }


def lane_lags(
    settings: Settings, lanes: Sequence[LaneSettings] | None = None
) -> list[PartitionLag]:
    """Every partition of the lanes (all enabled ones), once. See ``LagReader``."""
    with closing(LagReader(settings, lanes)) as reader:
        return reader.read()
