"""What happens to a micro-batch's windows: the cache, the model version of each, retries."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from consumers.bisection import infer_each
from consumers.cached import CachedInference, Outcome
from consumers.channels import channel_set
from consumers.intake import MicroBatch
from consumers.items import lane_of
from consumers.requests import RequestMeter
from consumers.retry import retrying
from consumers.rollout import RolloutFollower, RolloutStatistics
from consumers.service_times import ServiceTimes
from consumers.shadow import Shadow, ShadowStatistics
from inference.cache import CacheStatistics, FeatureCache
from inference.client import Inference, Inferencer, ModelDescription
from schemas.errors import ConfigError, PoisonRecord
from schemas.settings import Settings


class ModelStage:
    """A worker's side of the model. ``open`` it first.

    Args:
        is_idle: whether no record waits and no micro-batch is at the model.
    """

    def __init__(
        self,
        settings: Settings,
        inferencer: Inferencer,
        service_times: ServiceTimes,
        *,
        is_idle: Callable[[], bool],
    ) -> None:
        self._settings = settings
        self._inferencer = inferencer
        self._service_times = service_times
        self._cached_lanes = {lane.name for lane in settings.active_lanes if lane.cache}
        self._cache: FeatureCache | None = None
        self._cached: CachedInference | None = None
        self._batch_sizes: Counter[int] = Counter()
        self._model: ModelDescription | None = None
        self._rollout = RolloutFollower(settings.model.store, inferencer, self._serve)
        self._shadow = Shadow(inferencer, is_idle)
        self.requests = RequestMeter([lane.name for lane in settings.active_lanes])

    async def open(self) -> ModelDescription:
        """Asks the model what it is. Raises TransientError when it stays away."""
        deadline_s = self._settings.worker.retry_deadline_s
        self._serve(await retrying("describe_model", self._inferencer.describe, deadline_s))
        await self._rollout.look()
        model = self.model
        if self._cached_lanes:
            self._cache = FeatureCache(self._settings.cache, self._settings.redis, model)
            self._cached = CachedInference(self._cache)
        return model

    @property
    def model(self) -> ModelDescription:
        """Of the version that serves."""
        assert self._model is not None
        return self._model

    @property
    def model_version(self) -> str:
        """The same's name; empty before ``open``."""
        return self._model.model_version if self._model else ""

    @property
    def max_batch(self) -> int:
        """The most windows that it does in time, as far as that was tried."""
        tried = self._model.max_batch if self._model else None
        return tried or self._settings.worker.max_batch

    async def look_at_rollout(self) -> None:
        """Takes on what the model store says, if that is new and can be served."""
        await self._rollout.look()

    async def infer(self, batch: MicroBatch) -> list[Outcome]:
        """One outcome a window, in their order."""
        if not batch.items.num:
            return []
        self._batch_sizes[1 << (batch.items.num - 1).bit_length()] += 1
        lanes = Counter(map(lane_of, batch.items.records))
        self.requests.asked(lanes)
        begun_s = time.monotonic()
        try:
            outcomes = await self._outcomes(batch)
        except Exception:
            self.requests.ended(lanes, lanes, time.monotonic() - begun_s)
            raise
        failed = Counter(
            batch.items.records[row].lane
            for row, outcome in enumerate(outcomes)
            if isinstance(outcome, PoisonRecord)
        )
        self.requests.ended(lanes, failed, time.monotonic() - begun_s)
        return outcomes

    def compare(self, batch: MicroBatch, outcomes: list[Outcome]) -> None:
        """Has the shadow version compute some of the same windows, if nothing wants the model."""
        if batch.items.num:
            self._shadow.offer(self._rollout.shadow, batch.windows, outcomes)

    async def _outcomes(self, batch: MicroBatch) -> list[Outcome]:
        """By the version that each symbol is for."""
        groups = self._rollout.group(batch.items.events.symbols)
        if len(groups) == 1:
            [version] = groups
            return await self._infer_by(version, batch, batch.windows, None)
        parts = [
            self._infer_by(version, batch, batch.windows[rows], rows)
            for version, rows in groups.items()
        ]
        made = await asyncio.gather(*parts)
        by_row = dict[int, Outcome]()
        for rows, part in zip(groups.values(), made, strict=True):
            by_row.update(zip(rows, part, strict=True))
        return [by_row[row] for row in range(batch.items.num)]

    async def close(self) -> None:
        await self._shadow.close()
        if self._cache:
            await self._cache.close()

    def batch_sizes(self) -> dict[int, int]:
        """How many micro-batches had so many windows, rounded up to a power of two."""
        return dict(sorted(self._batch_sizes.items()))

    def cache_statistics(self) -> CacheStatistics:
        return self._cache.statistics() if self._cache else CacheStatistics()

    def rollout_statistics(self) -> RolloutStatistics:
        return self._rollout.statistics()

    def shadow_statistics(self) -> ShadowStatistics:
        return self._shadow.statistics()

    async def _infer_by(
        self,
        version: str | None,
        batch: MicroBatch,
        windows: NDArray[np.float32],
        rows: list[int] | None,
    ) -> list[Outcome]:
        infer = partial(self._infer_each, version)
        if not self._cached:
            return await infer(windows)
        records = batch.items.records
        wanted = [record.lane in self._cached_lanes for record in records]
        if rows is not None:
            wanted = [wanted[row] for row in rows]
        if not any(wanted):
            return await infer(windows)
        named = version or self.model_version
        return await self._cached.infer_each(named, windows, wanted, infer)

    async def _infer_each(self, version: str | None, windows: NDArray[np.float32]) -> list[Outcome]:
        deadline_s = self._settings.worker.retry_deadline_s

        async def infer(part: NDArray[np.float32]) -> Inference:
            return await retrying("infer", lambda: self._call(part, version), deadline_s)

        return await infer_each(infer, windows)

    async def _call(self, windows: NDArray[np.float32], version: str | None) -> Inference:
        begun_s = time.monotonic()
        inference = await self._inferencer.infer(windows, version)
        self._service_times.observe(len(windows), begun_s, time.monotonic())
        return inference

    def _serve(self, model: ModelDescription) -> None:
        """Takes on what serves from now on. Raises ConfigError unless it fits the windows."""
        window = self._settings.window
        num_channels = channel_set(window.channel_set).num_channels
        for what, has, needs in (
            ("channel set", window.channel_set, model.channels_version),
            ("number of channels", num_channels, model.num_channels),
            ("window.num_steps", window.num_steps, model.num_steps),
        ):
            if has != needs:
                raise ConfigError(
                    f"model {model.model_version} needs the {what} {needs}, the settings say {has}"
                )
        self._model = model
        self._service_times.expect(model.bucket_s)
