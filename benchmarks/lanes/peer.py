"""The peer: what a user would write with ``@serve.batch``, for a comparison. Not part of Tapeline.

    python -m benchmarks.lanes.peer WAIT_S

A consumer, a window per symbol, a Serve deployment that makes its own batches, a producer. Windows,
model, messages and Ray are the same as Tapeline's; what is left out is all that Tapeline is for:
lanes, duplicates, order, dead letters, commits after the feature.
"""

import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from confluent_kafka import Consumer, Producer
from numpy.typing import NDArray
from ray import serve

from consumers.channels import channel_set
from consumers.columns import EventDecoder
from consumers.windows import WindowStore
from inference.client import Inference
from inference.engine import load_engine
from schemas.codec import Codec
from schemas.kafka import client_config, consume_ready, make_client, message_headers
from schemas.messages import FeatureVector, MarketEvent
from schemas.settings import ModelSettings, Settings, load_settings
from tapeline.app import ray_session

_MAX_BATCH = 64
_MAX_POLLED = 500
_POLL_S = 0.1


class BatchingModel:
    """The engine behind ``@serve.batch``, as Ray's guide shows it."""

    def __init__(self, settings: ModelSettings, wait_s: float) -> None:
        self._engine = load_engine(settings)
        self.infer.set_batch_wait_timeout_s(wait_s)  # type: ignore[attr-defined]

    @serve.batch(max_batch_size=_MAX_BATCH, batch_wait_timeout_s=0.01)
    async def infer(self, windows: list[NDArray[np.float32]]) -> list[Inference]:
        made = self._engine.infer(np.stack(windows))
        return [
            Inference(made.features[row : row + 1], made.scores[row : row + 1], made.model_version)
            for row in range(len(windows))
        ]

    async def score_names(self) -> tuple[str, ...]:
        return self._engine.describe().score_names


class Loop:
    """Polls, keeps windows, asks the model for each event, produces what comes back."""

    def __init__(self, settings: Settings, model: Any, score_names: tuple[str, ...]) -> None:
        self._lane = settings.active_lanes[0]
        self._model = model
        self._codec = Codec(settings.schema_registry)
        channels = channel_set(settings.window.channel_set)
        self._windows = WindowStore(channels, settings.window)
        for number in range(settings.kafka.num_partitions):
            self._windows.assign((self._lane.topic, number))
        self._decoder = EventDecoder(self._codec, channels.check)
        self._score_names = score_names
        self._consumer: Consumer = make_client(
            Consumer,
            client_config(
                settings,
                defaults={"group.id": self._lane.group, "auto.offset.reset": "earliest"},
            ),
        )
        self._producer: Producer = make_client(
            Producer, client_config(settings, defaults={"linger.ms": 1})
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, ended: asyncio.Event) -> None:
        self._consumer.subscribe([self._lane.topic])
        while not ended.is_set():
            messages = await asyncio.to_thread(consume_ready, self._consumer, _MAX_POLLED, _POLL_S)
            for message in messages:
                if message.error() is None:
                    self._begin(message)
        await asyncio.gather(*self._tasks)
        self._producer.flush()
        self._consumer.close()

    def _begin(self, message: Any) -> None:
        """Adds the event to its window and, if that is full, sends it to the model."""
        partition = (message.topic(), message.partition())
        event = self._codec.decode_event(message.value(), message_headers(message))
        appended = self._windows.append(
            [partition],
            [message.offset()],
            self._decoder.columns_of([event]),
            np.ones(1, bool),
            np.zeros(1, np.int64),
        )
        if not len(appended.windows):
            return
        task = asyncio.create_task(self._answer(message, event, appended.windows[0]))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Any, event: MarketEvent, window: NDArray[np.float32]) -> None:
        inference: Inference = await self._model.infer.remote(window)
        scores = zip(self._score_names, inference.scores[0].tolist(), strict=True)
        feature = FeatureVector(
            event_id=event.event_id,
            symbol=event.symbol,
            venue=event.venue,
            event_time_us=event.event_time_us,
            lane=self._lane.name,
            model_version=inference.model_version,
            channels_version=self._windows.channels.version,
            source_topic=message.topic(),
            source_partition=message.partition(),
            source_offset=message.offset(),
            features=inference.features[0],
            scores=dict(scores),
            source_appended_us=message.timestamp()[1] * 1000,
        )
        value = self._codec.encode_feature(feature)
        self._producer.produce(self._lane.output_topic, value, event.symbol.encode())
        self._producer.poll(0)


async def _serve(settings: Settings, wait_s: float) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    as_deployment = serve.deployment(
        name="peer",
        max_ongoing_requests=4096,
        ray_actor_options={"num_cpus": settings.serve.model_num_cpus},
        logging_config={"enable_access_log": False},
    )
    application = as_deployment(BatchingModel).bind(settings.model, wait_s)
    model = await asyncio.to_thread(serve.run, application, name="peer", route_prefix=None)
    score_names = await model.score_names.remote()
    await Loop(settings, model, score_names).run(ended)


def main(arguments: Sequence[str]) -> None:
    """Runs until SIGTERM, with the settings of the environment."""
    (wait_s,) = arguments
    settings = load_settings()
    with ray_session(settings, log_to_driver=False):
        asyncio.run(_serve(settings, float(wait_s)))


if __name__ == "__main__":
    main(sys.argv[1:])
