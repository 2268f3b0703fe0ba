"""What a bench asks: the whole pipeline, or the model deployment alone."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import numpy as np

from inference.client import Inferencer
from schemas.errors import TapelineError, TransientError
from schemas.messages import MarketEvent
from schemas.settings import Settings
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate
from tapeline.subscriber import FeatureSubscriber

_WARM_UP_S = 60.0
_LOOK_EVERY_S = 0.5


class PipelineTarget:
    """An event through a lane of a running processor, until its feature is read.

    Its symbols are its own, ``BENCH01`` and so on; their windows are filled first. The events'
    features are published like any others.
    """

    def __init__(self, settings: Settings, lane: str, num_symbols: int, seed: int) -> None:
        self._settings = settings
        self._lane = lane
        self._symbols = [f"BENCH{number:02d}" for number in range(1, num_symbols + 1)]
        self._events = simulate(
            symbols=self._symbols, seed=seed, start_time_us=time.time_ns() // 1000
        )
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._subscriber = FeatureSubscriber(
            settings, lanes=[lane], symbols=self._symbols, undecodable="skip"
        )
        self._error: TapelineError | None = None

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._producer = MarketEventProducer(self._settings)
        await asyncio.to_thread(self._subscriber.open)
        self._thread = threading.Thread(target=self._read, name="features", daemon=True)
        self._thread.start()
        await self._fill_windows()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self._subscriber.close)
        await asyncio.to_thread(self._thread.join)
        await asyncio.to_thread(self._producer.close, 5)

    async def request(self, number: int) -> None:
        event = next(self._events)
        answered = self._waiting[event.event_id] = self._loop.create_future()
        try:
            self._produce(event)
            await answered
        finally:
            del self._waiting[event.event_id]

    def _produce(self, event: MarketEvent) -> None:
        if self._error:
            raise self._error
        self._producer.produce(event, lane=self._lane)

    async def _fill_windows(self) -> None:
        """Sends events until one of each symbol comes back as a feature.

        Raises TransientError when that takes a minute: nothing works on the lane.
        """
        missing = set(self._symbols)
        deadline_s = time.monotonic() + _WARM_UP_S
        while missing:
            asked = {}
            for _ in range(5 * len(self._symbols)):
                event = next(self._events)
                asked[event.event_id] = event.symbol
                self._waiting[event.event_id] = self._loop.create_future()
                self._produce(event)
            await asyncio.wait([self._waiting[one] for one in asked], timeout=_LOOK_EVERY_S)
            missing -= {symbol for one, symbol in asked.items() if self._waiting[one].done()}
            if time.monotonic() > deadline_s:
                raise TransientError(
                    f"no features of lane {self._lane} within {_WARM_UP_S:g} s; is `tapeline run` "
                    "or `tapeline worker` up, with the same settings?"
                )
        self._waiting.clear()

    def _read(self) -> None:
        try:
            for feature in self._subscriber:
                self._loop.call_soon_threadsafe(self._answer, feature.event_id)
        except TapelineError as error:
            self._error = error

    def _answer(self, event_id: str) -> None:
        answered = self._waiting.get(event_id)
        if answered and not answered.done():
            answered.set_result(None)


class ModelTarget:
    """A micro-batch of made-up windows to a model.

    Args:
        num_windows: of a request.
    """

    def __init__(self, inferencer: Inferencer, num_windows: int, seed: int) -> None:
        self._inferencer = inferencer
        self._num_windows = num_windows
        self._random = np.random.default_rng(seed)

    async def __aenter__(self) -> Self:
        model = await self._inferencer.describe()
        shape = (self._num_windows, model.num_channels, model.num_steps)
        self._windows = self._random.normal(0, 1, shape).astype(np.float32)
        await self.request(0)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._inferencer.close()

    async def request(self, number: int) -> None:
        await self._inferencer.infer(self._windows)


@asynccontextmanager
async def deployment_target(
    settings: Settings, num_windows: int, seed: int
) -> AsyncIterator[ModelTarget]:
    """The model of the running application, or of one that is deployed for the while.

    A Ray session must be open.
    """
    from ray import serve

    from inference.deployment import build_model_deployment
    from inference.redeploy import MODEL_NAME
    from inference.remote import ServeInferencer

    name = settings.serve.app_name
    own = name not in serve.status().applications
    if own:
        name = f"{name}-bench"
        application = build_model_deployment(settings.model, settings.serve, window=settings.window)
        await asyncio.to_thread(serve.run, application, name=name, route_prefix=None)
    try:
        handle = serve.get_deployment_handle(MODEL_NAME, name)
        async with ModelTarget(ServeInferencer(handle), num_windows, seed) as target:
            yield target
    finally:
        if own:
            await asyncio.to_thread(serve.delete, name)
