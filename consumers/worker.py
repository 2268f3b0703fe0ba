"""The way of an event, top to bottom: poll, decode, dedup, window, infer, publish, commit.

The loop knows no Ray: ``tapeline worker`` runs it in a plain process, ``consumers.deployment`` in a
Serve replica.
"""

import asyncio
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import structlog
from numpy.typing import NDArray
from prometheus_client.registry import REGISTRY, CollectorRegistry

from consumers.channels import channel_set
from consumers.dedup import FirstSeen
from consumers.envelopes import Envelopes
from consumers.metrics import LaneCounts, WorkerCollector, WorkerStatistics, latency_histogram
from consumers.offsets import PartitionProgress, Span
from consumers.poller import LanePoller
from consumers.publisher import Outgoing, Publisher
from consumers.records import Assignment, CommitPoint, Partition, Record
from consumers.retry import retrying
from consumers.scheduler import LaneScheduler
from consumers.windows import WindowStore
from inference.client import Inference, Inferencer, ModelDescription
from schemas.codec import Codec
from schemas.errors import ConfigError, PoisonRecord
from schemas.messages import Flags, MarketEvent
from schemas.settings import LaneSettings, Settings

_log = structlog.get_logger(__name__)


class Item(NamedTuple):
    """A record on its way, with the assignment that it came by."""

    record: Record
    progress: PartitionProgress
    event: MarketEvent

    @property
    def is_live(self) -> bool:
        """A feature is owed; else it only rebuilds its window."""
        return self.record.offset >= self.progress.live_from


@dataclass(slots=True, eq=False)
class MicroBatch:
    """Records that go to the model together, and what is owed for them.

    Attributes:
        items, flags: one each per window.
        windows: float32, (B, C, T).
        letters: poison records and why.
        spans: what these records keep from being committed.
        turns: done when the earlier micro-batches of the same partitions are published.
        published: done when this one is.
    """

    items: list[Item]
    flags: NDArray[np.uint8]
    windows: NDArray[np.float32]
    letters: list[tuple[Record, PoisonRecord]]
    spans: list[tuple[PartitionProgress, Span]]
    turns: list[asyncio.Future[None]]
    published: asyncio.Future[None]


class Worker:
    """Turns the events of its assigned partitions into features.

    Several micro-batches are in flight. Each partition's features are published in offset order,
    and its committed offset never passes an unfinished record.

    Args:
        inferencer: the model; closed by whoever made it, as is ``first_seen``.
        clock: Unix time in seconds, for what is stamped on messages.
    """

    def __init__(
        self,
        settings: Settings,
        inferencer: Inferencer,
        first_seen: FirstSeen,
        *,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._lanes = {lane.name: lane for lane in settings.active_lanes}
        self._inferencer = inferencer
        self._first_seen = first_seen
        self._clock = clock
        self._codec = Codec(settings.schema_registry)
        self._scheduler = LaneScheduler(settings.active_lanes)
        self._windows = WindowStore(channel_set(settings.window.channel_set), settings.window)
        self._progress: dict[Partition, PartitionProgress] = {}
        self._last_turns: dict[Partition, asyncio.Future[None]] = {}
        self._counts = {name: LaneCounts() for name in self._lanes}
        self._batch_sizes: Counter[int] = Counter()
        self._model: ModelDescription | None = None
        self._slots = asyncio.Semaphore(settings.worker.max_in_flight)
        self._arrived = asyncio.Event()
        self._advanced = asyncio.Condition()
        self._stopping = asyncio.Event()
        self._drain_timeout_s = settings.worker.drain_timeout_s
        self._latency = latency_histogram(registry)
        registry.register(WorkerCollector(self.statistics))

    async def run(self) -> None:
        """Works until ``stop``; then finishes what is in flight, commits and leaves the group.

        Raises:
            ConfigError: the model and the settings do not fit each other, or a topic is missing.
            TransientError: something stayed away for longer than ``retry_deadline_s``.
        """
        self._model = model = await self._describe_model()
        channels_version = self._windows.channels.version
        self._envelopes = Envelopes(self._codec, channels_version, model.score_names)
        self._publisher = Publisher(self._settings)
        loop = asyncio.get_running_loop()
        pollers = [LanePoller(lane, self._settings, self, loop) for lane in self._lanes.values()]
        self._pollers = {poller.lane.name: poller for poller in pollers}
        try:
            async with asyncio.TaskGroup() as self._tasks:
                for poller in pollers:
                    poller.start()
                running = [self._tasks.create_task(_surface(poller.failure)) for poller in pollers]
                running.append(self._tasks.create_task(self._step_forever()))
                running.append(self._tasks.create_task(self._commit_regularly()))
                await self._stopping.wait()
                _log.info("worker_stopping")
                await self._close_pollers()
                for task in running:
                    task.cancel()
        except* Exception as group:
            self._drain_timeout_s = 0.0  # nothing in flight will finish any more
            await self._close_pollers()
            raise _first(group) from group
        finally:
            await self._publisher.close(self._settings.worker.drain_timeout_s)
            _log.info("worker_stopped")

    async def _close_pollers(self) -> None:
        await asyncio.gather(*(poller.close() for poller in self._pollers.values()))

    def stop(self) -> None:
        """Asks ``run`` to end; returns at once."""
        self._stopping.set()

    def statistics(self) -> WorkerStatistics:
        """A snapshot; callable from any thread."""
        return WorkerStatistics(
            model_version=self._model.model_version if self._model else "",
            lanes={name: replace(counts) for name, counts in self._counts.items()},
            queued={name: self._scheduler.num_queued(name) for name in self._lanes},
            batch_sizes=dict(sorted(self._batch_sizes.items())),
            num_partitions=len(self._progress),
            windows=self._windows.statistics(),
            first_seen=self._first_seen.statistics(),
        )

    # The way of an event.

    async def _step_forever(self) -> None:
        while True:
            await self._step()

    async def _step(self) -> None:
        """One micro-batch: all that waits when a slot is free, on its way to the model."""
        await self._slots.acquire()
        while not len(self._scheduler):
            self._arrived.clear()
            await self._arrived.wait()
        records = self._scheduler.take(self._settings.worker.max_batch)
        batch = await self._prepare(records)
        self._tasks.create_task(self._finish(batch))

    async def _prepare(self, records: list[Record]) -> MicroBatch:
        """Decodes, drops duplicates and fills windows: strictly one micro-batch after another."""
        owners = {record.partition: self._progress[record.partition] for record in records}
        spans = self._start_spans(records)
        items, letters = await retrying(
            "decode", lambda: self._decode(records, owners), self._settings.worker.retry_deadline_s
        )
        items = await self._drop_duplicates(items)
        return self._append(self._drop_abandoned(items), letters, spans)

    async def _finish(self, batch: MicroBatch) -> None:
        """Infers, waits for the turn of its partitions, publishes, and marks what is done."""
        try:
            inference = await self._infer(batch)
        finally:
            self._slots.release()
        for turn in batch.turns:
            await turn
        messages = self._messages(batch, inference)
        delivery = await self._publisher.send(messages)
        batch.published.set_result(None)
        await delivery
        self._count_finished(batch)
        for progress, span in batch.spans:
            progress.finish(span)
        async with self._advanced:
            self._advanced.notify_all()

    # Its stages.

    def _start_spans(self, records: Sequence[Record]) -> list[tuple[PartitionProgress, Span]]:
        ends: dict[Partition, int] = {}
        for record in records:
            counts = self._counts[record.lane]
            if record.offset >= self._progress[record.partition].live_from:
                counts.records += 1
                ends[record.partition] = record.offset + 1
            else:
                counts.replayed += 1
        owners = ((self._progress[partition], end) for partition, end in ends.items())
        return [(progress, progress.start(end)) for progress, end in owners]

    async def _decode(
        self, records: Sequence[Record], owners: Mapping[Partition, PartitionProgress]
    ) -> tuple[list[Item], list[tuple[Record, PoisonRecord]]]:
        items: list[Item] = []
        letters: list[tuple[Record, PoisonRecord]] = []
        for record in records:
            progress = owners[record.partition]
            try:
                items.append(Item(record, progress, self._event(record)))
            except PoisonRecord as poison:
                if record.offset >= progress.live_from:
                    letters.append((record, poison))
        return items, letters

    def _event(self, record: Record) -> MarketEvent:
        max_bytes = self._settings.worker.max_message_bytes
        if record.value is not None and len(record.value) > max_bytes:
            raise PoisonRecord(
                "decode",
                "too_large",
                f"{len(record.value)} bytes; worker.max_message_bytes is {max_bytes}",
            )
        event = self._codec.decode_event(record.value, record.headers)
        self._windows.channels.check(event)
        return event

    async def _drop_duplicates(self, items: list[Item]) -> list[Item]:
        sources = [item.record.source for item in items]
        first = await self._first_seen.sightings([item.event.event_id for item in items], sources)
        fresh = []
        for item, source, first_source in zip(items, sources, first, strict=True):
            if source == first_source:
                fresh.append(item)
            elif item.is_live:
                self._counts[item.record.lane].duplicates += 1
        return fresh

    def _drop_abandoned(self, items: list[Item]) -> list[Item]:
        """Leaves out what belongs to a partition's next owner by now."""
        for item in items:
            if item.progress.closed and item.is_live:
                self._counts[item.record.lane].abandoned += 1
        return [item for item in items if not item.progress.closed]

    def _append(
        self,
        items: list[Item],
        letters: list[tuple[Record, PoisonRecord]],
        spans: list[tuple[PartitionProgress, Span]],
    ) -> MicroBatch:
        """Adds the events to their windows and takes out those that the model shall see."""
        lanes = [self._lanes[item.record.lane] for item in items]
        wanted = [
            item.is_live and _is_sampled(item.event, lane.stride)
            for item, lane in zip(items, lanes, strict=True)
        ]
        appended = self._windows.append(
            [item.record.partition for item in items],
            [item.record.offset for item in items],
            [item.event for item in items],
            np.array(wanted, bool),
            np.array([int(lane.min_interval_ms * 1000) for lane in lanes], np.int64),
        )
        for item, full, given in zip(items, appended.full, appended.given, strict=True):
            item.progress.appended = item.record.offset + 1
            if item.is_live and not full:
                self._counts[item.record.lane].warm_up += 1
            elif item.is_live and not given:
                self._counts[item.record.lane].thinned += 1

        published: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        partitions = [progress.partition for progress, _ in spans]
        turns = [self._last_turns[one] for one in partitions if one in self._last_turns]
        self._last_turns.update(dict.fromkeys(partitions, published))
        return MicroBatch(
            items=[item for item, given in zip(items, appended.given, strict=True) if given],
            flags=appended.flags[appended.given],
            windows=appended.windows,
            letters=letters,
            spans=spans,
            turns=turns,
            published=published,
        )

    async def _infer(self, batch: MicroBatch) -> Inference | None:
        if not batch.items:
            return None
        self._batch_sizes[1 << (len(batch.items) - 1).bit_length()] += 1
        return await retrying(
            "infer",
            lambda: self._inferencer.infer(batch.windows),
            self._settings.worker.retry_deadline_s,
        )

    def _messages(self, batch: MicroBatch, inference: Inference | None) -> list[Outgoing]:
        """Features and dead letters; no feature for a partition that was taken away meanwhile."""
        now_us = int(self._clock() * 1e6)
        messages = []
        for row, item in enumerate(batch.items):
            assert inference is not None
            lane = self._lanes[item.record.lane]
            if item.progress.closed:
                self._counts[lane.name].abandoned += 1
                continue
            flags = Flags(int(batch.flags[row]))
            if _is_stale(lane, item.record, now_us):
                flags |= Flags.STALE
            messages.append(
                self._envelopes.feature(lane, item.record, item.event, inference, row, flags)
            )
        for record, poison in batch.letters:
            lane = self._lanes[record.lane]
            messages.append(self._envelopes.dead_letter(lane, record, poison, now_us))
        return messages

    def _count_finished(self, batch: MicroBatch) -> None:
        now_us = int(self._clock() * 1e6)
        for item in batch.items:
            if item.progress.closed:
                continue
            lane = self._lanes[item.record.lane]
            counts = self._counts[lane.name]
            counts.features += 1
            counts.stale += _is_stale(lane, item.record, now_us)
            elapsed_us = now_us - item.record.appended_us
            self._latency.labels(lane.name).observe(elapsed_us / 1e6)
        for record, poison in batch.letters:
            self._counts[record.lane].dead_letters += 1
            _log.warning(
                "dead_letter", source=record.source, reason=poison.reason, message=str(poison)
            )

    # What the pollers ask of it, on the event loop.

    def put(self, lane: str, records: list[Record]) -> None:
        """Queues what a poller brought; records of partitions revoked meanwhile are dropped."""
        owned = [record for record in records if record.partition in self._progress]
        self._scheduler.put(lane, owned)
        self._arrived.set()

    def num_queued(self, lane: str) -> int:
        """Records of the lane that wait."""
        return self._scheduler.num_queued(lane)

    async def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Takes on partitions with empty windows."""
        for assignment in assignments:
            self._windows.assign(assignment.partition)
            self._progress[assignment.partition] = PartitionProgress(assignment)

    async def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> list[CommitPoint]:
        """Finishes what is in flight for these partitions, or abandons it, and forgets them."""
        leaving = [self._progress[one] for one in partitions if one in self._progress]
        for partition in partitions:
            self._scheduler.drop(partition)
        if not lost:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._drain_timeout_s), self._advanced:
                    await self._advanced.wait_for(lambda: all(one.is_idle for one in leaving))
        points = [] if lost else self._commit_points(leaving)
        for progress in leaving:
            progress.closed = True
            del self._progress[progress.partition]
            self._last_turns.pop(progress.partition, None)
            self._windows.revoke(progress.partition)
            _log.info("partition_revoked", partition=progress.partition, lost=lost)
        return points

    # Around it.

    async def _commit_regularly(self) -> None:
        lane_of = {lane.topic: name for name, lane in self._lanes.items()}
        while True:
            await asyncio.sleep(self._settings.worker.commit_interval_ms / 1000)
            points = self._commit_points(list(self._progress.values()))
            for name, poller in self._pollers.items():
                poller.commit([one for one in points if lane_of[one.partition[0]] == name])

    def _commit_points(self, progresses: Sequence[PartitionProgress]) -> list[CommitPoint]:
        for progress in progresses:
            partition, position = progress.partition, progress.appended
            progress.checkpoint(self._windows.replay_offset(partition, position))
        return [point for one in progresses if (point := one.commit_point())]

    async def _describe_model(self) -> ModelDescription:
        deadline_s = self._settings.worker.retry_deadline_s
        model = await retrying("describe_model", self._inferencer.describe, deadline_s)
        channels, window = self._windows.channels, self._settings.window
        for what, has, needs in (
            ("channel set", channels.version, model.channels_version),
            ("number of channels", channels.num_channels, model.num_channels),
            ("window.num_steps", window.num_steps, model.num_steps),
        ):
            if has != needs:
                raise ConfigError(
                    f"model {model.model_version} needs the {what} {needs}, the settings say {has}"
                )
        return model


def _is_stale(lane: LaneSettings, record: Record, now_us: int) -> bool:
    return lane.expired == "stale" and now_us - record.appended_us > lane.deadline_ms * 1000


def _is_sampled(event: MarketEvent, stride: int) -> bool:
    """One event in ``stride``, by a hash of its id: a replay chooses the same ones."""
    return stride == 1 or zlib.crc32(event.event_id.encode()) % stride == 0


async def _surface(failure: asyncio.Future[None]) -> None:
    await failure


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error in a group of groups: what the user is told."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
