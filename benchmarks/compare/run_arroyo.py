"""Sentry's arroyo, as its documentation has it: a StreamProcessor whose last strategy produces."""

import signal
from collections.abc import Mapping
from typing import Any

from arroyo import Topic
from arroyo.backends.kafka import KafkaConsumer, KafkaPayload, KafkaProducer
from arroyo.backends.kafka.configuration import (
    build_kafka_configuration,
    build_kafka_consumer_configuration,
)
from arroyo.processing import StreamProcessor
from arroyo.processing.strategies import (
    CommitOffsets,
    ProcessingStrategy,
    ProcessingStrategyFactory,
    Produce,
    RunTask,
)
from arroyo.types import Commit, Message, Partition
from work import Windows, environment, process


class Factory(ProcessingStrategyFactory[KafkaPayload]):
    def __init__(self, producer: KafkaProducer, topic: Topic) -> None:
        self._producer = producer
        self._topic = topic
        self._windows = Windows()

    def create_with_partitions(
        self, commit: Commit, partitions: Mapping[Partition, int]
    ) -> ProcessingStrategy[KafkaPayload]:
        return RunTask(self._task, Produce(self._producer, self._topic, CommitOffsets(commit)))

    def _task(self, message: Message[KafkaPayload]) -> KafkaPayload:
        return KafkaPayload(*process(self._windows, message.payload.value), [])


def main() -> None:
    broker, topic_in, topic_out, group = environment()
    config: dict[str, Any] = build_kafka_configuration({}, bootstrap_servers=[broker])
    consumer = KafkaConsumer(
        build_kafka_consumer_configuration(
            {}, bootstrap_servers=[broker], auto_offset_reset="earliest", group_id=group
        )
    )
    factory = Factory(KafkaProducer(config), Topic(topic_out))
    processor = StreamProcessor(consumer=consumer, topic=Topic(topic_in), processor_factory=factory)
    signal.signal(signal.SIGTERM, lambda *_: processor.signal_shutdown())
    processor.run()


if __name__ == "__main__":
    main()
