"""Faust-streaming, as its documentation has it: an agent over a topic."""

import sys
import tempfile
from typing import Any

import faust
from work import Windows, environment, process

broker, topic_in, topic_out, group = environment()
app = faust.App(
    group,
    broker=f"kafka://{broker}",
    datadir=tempfile.mkdtemp(),
    topic_disable_leader=True,
    consumer_auto_offset_reset="earliest",
    web_enabled=False,
)
source = app.topic(topic_in, value_type=bytes, value_serializer="raw", key_serializer="raw")
target = app.topic(topic_out, value_type=bytes, value_serializer="raw", key_serializer="raw")
windows = Windows()


@app.agent(source)
async def features(stream: Any) -> None:
    async for value in stream:
        key, feature = process(windows, value)
        await target.send(key=key, value=feature)


if __name__ == "__main__":
    sys.argv = [sys.argv[0], "worker", "-l", "error"]
    app.main()
