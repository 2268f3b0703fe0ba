"""The way of an event, top to bottom: poll, decode, dedup, window, infer, publish, commit.

The loop knows no Ray: ``tapeline worker`` runs it in a plain process, ``consumers.deployment`` in a
Serve replica.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import structlog
from prometheus_client.registry import REGISTRY, CollectorRegistry

from consumers.admission import Admission, Call
from consumers.assignments import Assignments, StalledHead
from consumers.budget import BatchTimes, LatencyBudget
from consumers.channels import channel_set
from consumers.dedup import FirstSeen
from consumers.guard import ResourceGuard, Restraint
from consumers.intake import Intake, MicroBatch
from consumers.items import appended_us_of, partition_of
from consumers.metrics import LaneCounts, WorkerCollector, WorkerStatistics
from consumers.model_stage import ModelStage
from consumers.packing import Packer
from consumers.parcels import Outlet, Parcel
from consumers.poller import LanePoller
from consumers.publisher import Publisher
from consumers.records import Assignment, CommitPoint, Partition, Record
from consumers.scheduler import LaneScheduler
from consumers.service_times import ServiceTimes
from consumers.tracing import Tracing
from consumers.transactions import LaneTransactions
from consumers.windows import WindowStore
from inference.client import Inferencer
from schemas.codec import Codec
from schemas.errors import ConfigError, TapelineError
from schemas.live import demand_only_live, live_part
from schemas.resources import ResourceMeter
from schemas.settings import Settings

_log = structlog.get_logger(__name__)
_WATCH_EVERY_S = 1.0


class Worker:
    """Turns the events of its assigned partitions into features.

    Several micro-batches are in flight. Each partition's features are published in offset order,
    and its committed offset never passes an unfinished record.

    Args:
        inferencer: the model; closed by whoever made it, as is ``first_seen``.
        instance_id: a name that no other worker has now and that this one has again after a
            restart; ``exactly_once`` and ``static_membership`` need it.
        num_replicas: micro-batches that the model works on at once.
        tracing: None: no spans. Closed with the worker.
        clock: Unix time in seconds, for what is stamped on messages.
    """

    def __init__(
        self,
        settings: Settings,
        inferencer: Inferencer,
        first_seen: FirstSeen,
        *,
        instance_id: str | None = None,
        num_replicas: int = 1,
        tracing: Tracing | None = None,
        registry: CollectorRegistry = REGISTRY,
        clock: Callable[[], float] = time.time,
    ) -> None:
        worker = self._limits = settings.worker
        self._settings = settings
        self._lanes = {lane.name: lane for lane in settings.active_lanes}
        self._lane_of = {lane.topic: lane.name for lane in settings.active_lanes}
        self._first_seen = first_seen
        self._instance_id = instance_id
        self._clock = clock
        self._codec = Codec(settings.schema_registry)
        self._service_times = ServiceTimes(num_replicas)
        self._admission = Admission(
            self._service_times, num_replicas, interval_s=worker.batch_interval_ms / 1000
        )
        self._scheduler = LaneScheduler(
            settings.active_lanes,
            self._service_times,
            max_batch=worker.max_batch,
            max_service_share=worker.max_service_share,
        )
        self._windows = WindowStore(channel_set(settings.window.channel_set), settings.window)
        self._assignments = Assignments(self._windows)
        self._counts = {name: LaneCounts() for name in self._lanes}
        self._intake = Intake(
            settings,
            first_seen,
            self._assignments,
            self._windows,
            self._codec,
            self._counts,
            clock,
        )
        self._model = ModelStage(
            settings,
            inferencer,
            self._service_times,
            is_idle=lambda: not len(self._scheduler) and not self._admission.num_calls,
        )
        self._tracing = tracing
        self._packer: Packer | None = None
        self._pollers: dict[str, LanePoller] = {}
        self._outlets: dict[str, Outlet] = {}
        self._slots = asyncio.Semaphore(worker.max_in_flight)
        self._room = asyncio.Semaphore(max(worker.max_unacknowledged, worker.max_in_flight))
        self._arrived = asyncio.Event()
        self._answered = asyncio.Event()
        self._advanced = asyncio.Condition()
        self._stopping = asyncio.Event()
        self._commits_in_transactions = worker.delivery == "exactly_once"
        self._drain_timeout_s = worker.drain_timeout_s
        self._num_undrained = 0
        self._stalled: tuple[StalledHead, ...] = ()
        self._finishing: set[asyncio.Task[None]] = set()
        self._num_tasks = 0
        self._guard = ResourceGuard(settings.guard, settings.active_lanes, worker.max_batch)
        self._budget = LatencyBudget(list(self._lanes))
        self._letters: Counter[tuple[str, str]] = Counter()
        registry.register(WorkerCollector(self.statistics, self._budget, self._model.requests))

    async def run(self) -> None:
        """Works until ``stop``; then finishes what is in flight, commits and leaves the group.

        Raises:
            ConfigError: the model and the settings do not fit each other, or a topic is missing.
            TransientError: something stayed away for longer than ``retry_deadline_s``.
            DeadLetterFlood: too many records are poison.
            TapelineError: another worker has this one's name, and fenced it.
        """
        model = await self._model.open()
        self._guard.watch(self._settings.guard.watched(model.device))
        self._schedule()
        self._packer = Packer(self._settings, self._codec, model, self._counts, self._tracing)
        self._connect()
        outlets = set(self._outlets.values())
        try:
            await asyncio.gather(*(outlet.open() for outlet in outlets))
            async with asyncio.TaskGroup() as self._tasks:
                working = [self._step_forever(), self._commit_regularly(), self._watch()]
                working += [self._look_at_resources(model.device != "cpu")]
                working += [outlet.run() for outlet in outlets]
                working += [_surface(poller.failure) for poller in self._pollers.values()]
                running = [self._tasks.create_task(work) for work in working]
                for poller in self._pollers.values():
                    poller.start()
                await self._stopping.wait()
                _log.info("worker_stopping")
                await self._close_pollers()
                for task in [*running, *self._finishing]:  # what could not finish is void by now
                    task.cancel()
        except* Exception as group:
            self._drain_timeout_s = 0.0  # nothing in flight will finish any more
            await self._close_pollers()
            raise _first(group) from group
        finally:
            timeout_s = self._limits.drain_timeout_s
            await asyncio.gather(*(outlet.close(timeout_s) for outlet in outlets))
            await self._model.close()
            if self._tracing:
                await asyncio.to_thread(self._tracing.close)
            _log.info("worker_stopped", undrained_partitions=self._num_undrained)

    def _connect(self) -> None:
        """One poller a lane; one outlet for all lanes, or in ``exactly_once`` one each."""
        exactly_once = self._commits_in_transactions
        if (exactly_once or self._limits.static_membership) and not self._instance_id:
            raise ConfigError(
                "this worker has no name, which exactly_once and static membership need; "
                "set worker.instance_id"
            )
        member = self._instance_id if self._limits.static_membership else None
        loop = asyncio.get_running_loop()
        for name, lane in self._lanes.items():
            self._pollers[name] = LanePoller(lane, self._settings, self, loop, member)
        if exactly_once:
            self._outlets.update({name: self._transactions(name) for name in self._lanes})
        else:
            self._outlets.update(dict.fromkeys(self._lanes, Publisher(self._settings)))

    def _transactions(self, lane: str) -> LaneTransactions:
        assert self._instance_id
        return LaneTransactions(
            self._lanes[lane],
            self._settings,
            self._instance_id,
            group_metadata=self._pollers[lane].group_metadata,
            void=lambda: self._begin_again(lane),
        )

    async def _close_pollers(self) -> None:
        await asyncio.gather(*(poller.close() for poller in self._pollers.values()))

    def configure(self, settings: Settings) -> None:
        """Takes other shares, deadlines and limits, from the next micro-batch on.

        Raises ConfigError, and changes nothing, if anything else differs.
        """
        demand_only_live(self._settings, settings)
        self._settings, self._limits = settings, settings.worker
        lanes = settings.active_lanes
        self._lanes = {lane.name: lane for lane in lanes}
        self._schedule()
        self._intake.configure(lanes)
        if self._packer:
            self._packer.configure(lanes)
        _log.info("settings_changed", **live_part(settings))

    def _schedule(self) -> None:
        """Micro-batches as large as the settings allow and the model does in time."""
        max_batch = min(self._limits.max_batch, self._model.max_batch)
        self._scheduler.configure(
            list(self._lanes.values()),
            max_batch=max_batch,
            max_service_share=self._limits.max_service_share,
        )
        self._guard.configure(max_batch)

    def share_model(self, num_replicas: int) -> None:
        """Says on how many micro-batches of this worker the model works at once from now on."""
        self._admission.share(num_replicas)

    def stop(self) -> None:
        """Asks ``run`` to end; returns at once."""
        self._stopping.set()

    def check_health(self) -> None:
        """Raises TapelineError that names the partitions whose head does not move."""
        if self._stalled:
            heads = ", ".join(map(str, self._stalled))
            raise TapelineError(f"in flight for longer than worker.stall_after_s: {heads}")

    def statistics(self) -> WorkerStatistics:
        """A snapshot; callable from any thread."""
        outlets = self._outlets.items()
        return WorkerStatistics(
            model_version=self._model.model_version,
            lanes={name: replace(counts) for name, counts in self._counts.items()},
            queued={name: self._scheduler.num_queued(name) for name in self._lanes},
            batch_sizes=self._model.batch_sizes(),
            service_s=self._service_times.table(),
            scheduled=self._scheduler.num_taken(),
            guard=self._guard.statistics(),
            num_partitions=len(self._assignments),
            windows=self._windows.statistics(),
            first_seen=self._first_seen.statistics(),
            cache=self._model.cache_statistics(),
            rollout=self._model.rollout_statistics(),
            shadow=self._model.shadow_statistics(),
            transactions={
                name: outlet.statistics()
                for name, outlet in outlets
                if isinstance(outlet, LaneTransactions)
            },
            pollers={name: replace(one.statistics) for name, one in self._pollers.items()},
            letters=dict(self._letters),
            stalled=self._stalled,
            num_undrained=self._num_undrained,
            num_tasks=self._num_tasks,
        )

    # The way of an event.

    async def _step_forever(self) -> None:
        while True:
            await self._step()

    async def _step(self) -> None:
        """One micro-batch: what the scheduler gives when a slot is free, sent to the model."""
        await self._room.acquire()
        await self._slots.acquire()
        while not (records := await self._next_records()):
            pass  # revoked while it waited for the model
        begun_s = time.monotonic()
        batch = await self._intake.prepare(records)
        self._admission.prepared(len(records), begun_s, time.monotonic())
        # Now, not once the task runs: the next micro-batch would find the model free until then.
        call = self._admission.begin(batch.items.num, time.monotonic())
        finish = self._finish(batch, call)
        try:
            finishing = self._tasks.create_task(finish)
        except RuntimeError:  # the group takes no more: something has failed meanwhile
            finish.close()
            raise asyncio.CancelledError from None
        self._finishing.add(finishing)
        finishing.add_done_callback(self._finishing.discard)

    async def _next_records(self) -> list[Record]:
        """What the next micro-batch holds, as late as the model allows; empty only if all that
        waited was taken away meanwhile.
        """
        while not len(self._scheduler):
            self._arrived.clear()
            await self._arrived.wait()
        # One that leaves records behind is full: to wait would only make those later.
        if len(self._scheduler) <= self._scheduler.limit(self._now_us()):
            await asyncio.sleep(self._admission.too_soon_s(time.monotonic()))
        await self._until_model_is_nearly_free()
        return self._scheduler.take(self._now_us())

    async def _until_model_is_nearly_free(self) -> None:
        now_us = self._now_us()
        num_records = min(len(self._scheduler), self._scheduler.limit(now_us))
        wait_s = self._admission.wait_s(num_records, time.monotonic())
        if wait_s > 0:
            self._answered.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._answered.wait()

    async def _finish(self, batch: MicroBatch, call: Call) -> None:
        """Infers, waits for the turn of its partitions, sends, and marks what is done."""
        try:
            rows = await self._model.infer(batch)
        finally:
            self._admission.end(call, time.monotonic())
            self._answered.set()
            self._slots.release()
        self._model.compare(batch, rows)
        times = BatchTimes(batch.taken_us, batch.given_us, self._now_us())
        for turn in batch.turns:
            await turn
        assert self._packer
        parcels = self._packer.pack(batch, rows, times, self._model.model_version, self._now_us())
        for parcel in parcels:
            parcel.delivered.add_done_callback(partial(self._settle, parcel, times))
            await self._outlets[parcel.lane].send(parcel)
        batch.published.set_result(None)
        for parcel in parcels:
            await parcel.delivered
        self._room.release()
        async with self._advanced:
            self._advanced.notify_all()

    def _settle(self, parcel: Parcel, times: BatchTimes, delivered: asyncio.Future[bool]) -> None:
        """Counts what became of a parcel's records, and lets its partition advance."""
        if delivered.cancelled() or delivered.exception():
            return  # ``_finish`` raises it
        lane, counts = self._lanes[parcel.lane], self._counts[parcel.lane]
        now_us = self._now_us()
        if not delivered.result():
            counts.abandoned += len(parcel.features) + len(parcel.letters)
            for trace in parcel.traces:
                trace.abandon(now_us)
            return
        for trace in parcel.traces:
            trace.end(now_us)
        counts.features += len(parcel.features)
        if lane.expired == "stale":
            appended_us = np.array(list(map(appended_us_of, parcel.features)), np.int64)
            counts.stale += int(np.count_nonzero(lane.are_late(appended_us, now_us)))
        self._budget.observe(parcel.lane, parcel.features, times, now_us)
        for record, poison in parcel.letters:
            counts.dead_letters += 1
            self._letters[parcel.lane, poison.reason] += 1
            _log.warning(
                "dead_letter", source=record.source, reason=poison.reason, message=str(poison)
            )
        parcel.progress.finish(parcel.span)

    # What the pollers ask of it, on the event loop.

    def put(self, lane: str, records: list[Record]) -> None:
        """Queues what a poller brought; records of partitions revoked meanwhile are dropped."""
        taken_away = {
            one for one in set(map(partition_of, records)) if one not in self._assignments
        }
        if taken_away:
            records = [record for record in records if record.partition not in taken_away]
        self._scheduler.put(lane, records)
        self._arrived.set()

    def num_queued(self, lane: str) -> int:
        """Records of the lane that wait."""
        return self._scheduler.num_queued(lane)

    def max_queued(self, lane: str) -> int:
        """Records of the lane that may wait before it is paused."""
        return self._scheduler.max_queued(lane)

    def commit_failed(self, partitions: Sequence[Partition]) -> None:
        """Has the next regular commit name these partitions again."""
        for progress in self._assignments.owned(partitions):
            progress.commit_failed()

    async def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Takes on partitions with empty windows, under the model version that serves now."""
        await self._model.look_at_rollout()
        self._assignments.take_on(assignments)

    async def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> list[CommitPoint]:
        """Finishes what is in flight for these partitions, or abandons it, and forgets them.

        In ``exactly_once`` nothing is in flight only once its transaction has ended.
        """
        leaving = self._assignments.owned(partitions)
        for partition in partitions:
            self._scheduler.drop(partition)
        if not lost:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._drain_timeout_s), self._advanced:
                    await self._advanced.wait_for(lambda: all(one.is_idle for one in leaving))
        self._num_undrained += sum(not one.is_idle for one in leaving)
        self._assignments.checkpoint()
        points = [one.point_at(one.committable) for one in leaving if one.has_advanced]
        self._assignments.let_go(leaving)
        for progress in leaving:
            _log.info("partition_revoked", partition=progress.partition, lost=lost)
        return [] if lost or self._commits_in_transactions else points

    # Around it.

    def _now_us(self) -> int:
        return int(self._clock() * 1e6)

    def _begin_again(self, lane: str) -> None:
        """After an aborted transaction: all of the lane in flight is void, from here on."""
        leaving = self._assignments.of_topic(self._lanes[lane].topic)
        for progress in leaving:
            self._scheduler.drop(progress.partition)
        self._assignments.let_go(leaving)
        self._pollers[lane].go_back()

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._limits.commit_interval_ms / 1000)
            self._assignments.checkpoint()
            if not self._commits_in_transactions:
                points = self._assignments.commit_points()
                for name, poller in self._pollers.items():
                    of_lane = [one for one in points if self._lane_of[one.partition[0]] == name]
                    poller.commit(of_lane)

    async def _watch(self) -> None:
        """Looks for partitions that have stalled, and says so in the log, once each time."""
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            self._num_tasks = len(asyncio.all_tasks())
            await self._model.look_at_rollout()
            known = {(head.partition, head.offset) for head in self._stalled}
            self._stalled = self._assignments.stalled(time.monotonic(), self._limits.stall_after_s)
            for head in self._stalled:
                if (head.partition, head.offset) not in known:
                    _log.error("partition_stalled", **head._asdict())

    async def _look_at_resources(self, has_gpu: bool) -> None:
        """Steps back, and forward again, as the machine runs short of something."""
        meter = await asyncio.to_thread(ResourceMeter, gpu=has_gpu)
        before = Restraint()
        while True:
            await asyncio.sleep(_WATCH_EVERY_S)
            usage = await asyncio.to_thread(meter.read)
            now = self._guard.look(usage)
            self._scheduler.restrain(*now)
            if now != before:
                _log.warning("restraint_changed", **now._asdict(), **usage._asdict())
            before = now


async def _surface(failure: asyncio.Future[None]) -> None:
    await failure


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first error in a group of groups: what the user is told."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
