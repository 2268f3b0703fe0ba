"""What one writes in an afternoon: a consumer, a model behind ``@serve.batch``, a producer."""

import asyncio
import os
from typing import Any

import ray
from confluent_kafka import Consumer, Producer
from ray import serve
from work import Windows, decode, encode, environment, model

MAX_POLLED = 500


@serve.deployment(max_ongoing_requests=4096, logging_config={"enable_access_log": False})
class Model:
    @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.01)
    async def __call__(self, windows: list[Any]) -> list[Any]:
        import numpy as np

        return list(model(np.stack(windows)))


async def run() -> None:
    broker, topic_in, topic_out, group = environment()
    handle = await asyncio.to_thread(serve.run, Model.bind(), name="loop", route_prefix=None)
    consumer = Consumer(
        {"bootstrap.servers": broker, "group.id": group, "auto.offset.reset": "earliest"}
    )
    producer = Producer({"bootstrap.servers": broker, "linger.ms": 1})
    consumer.subscribe([topic_in])
    windows = Windows()
    while True:
        messages = await asyncio.to_thread(consumer.consume, MAX_POLLED, 0.01)
        events = [decode(one.value()) for one in messages if not one.error()]
        asked = [handle.remote(windows.append(event)) for event in events]
        for event, features in zip(events, await asyncio.gather(*asked), strict=True):
            producer.produce(topic_out, encode(event, features), event["symbol"].encode())
        producer.poll(0)


if __name__ == "__main__":
    folder = os.path.dirname(__file__)
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": folder}},
    )  # fmt: skip
    serve.start(proxy_location="Disabled")
    asyncio.run(run())
