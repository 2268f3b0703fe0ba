"""Quix Streams, as its documentation's quickstart has it: an Application, a StreamingDataFrame."""

from typing import Any

from quixstreams import Application
from work import Windows, environment, process


def main() -> None:
    broker, topic_in, topic_out, group = environment()
    app = Application(
        broker_address=broker, consumer_group=group, auto_offset_reset="earliest", loglevel="ERROR"
    )
    windows = Windows()

    def features_of(value: bytes) -> Any:
        return process(windows, value)[1]

    frame = app.dataframe(app.topic(topic_in, value_deserializer="bytes"))
    frame = frame.apply(features_of)
    frame.to_topic(app.topic(topic_out, value_serializer="bytes"))
    app.run()


if __name__ == "__main__":
    main()
