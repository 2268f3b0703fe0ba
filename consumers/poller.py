"""One lane's Kafka consumer and the thread that owns it.

One consumer has one queue in librdkafka, where low-priority records in front delay others; hence a
consumer per lane. The thread polls, hands whole batches to the event loop, and answers rebalances,
for which it waits until the loop has let go of the partitions.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from itertools import repeat
from queue import SimpleQueue
from typing import Any, Literal, Protocol, TypeVar

import structlog
from confluent_kafka import (
    OFFSET_BEGINNING,
    OFFSET_INVALID,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)

from consumers.offsets import decode_metadata, encode_metadata
from consumers.records import Assignment, CommitPoint, Partition, Record
from schemas.errors import ConfigError, TapelineError, TransientError
from schemas.kafka import all_headers, client_config, consume_ready, make_client
from schemas.lanes import LaneSettings
from schemas.settings import Settings, WorkerSettings

T = TypeVar("T")


_POLL_S = 0.1
_MAX_POLLED = 500
_FULL_S = 0.002
_PAUSE_AFTER_S = 0.5  # of a full queue; rebalances wait for so long at most
_RETRY_PAUSE_S = 0.1
_GATHERED = 65_536  # bytes
# librdkafka answers in about 0.5 ms, for which confluent-kafka 2.16 keeps Python's lock: asked
# before every poll it took a third of the worker's time.
_NOTE_PLACE_EVERY_S = 0.25
_log = structlog.get_logger(__name__)


@dataclass(slots=True)
class PollerStatistics:
    """What a lane's consumer did since its start.

    Attributes:
        paused: the lane's queue has been full for a while: what else there is waits in the topic.
        num_assigned, num_revoked, num_lost: partitions, by rebalances.
        num_commits, commit_s: that the broker took, and the seconds until it said so.
    """

    paused: bool = False
    num_assigned: int = 0
    num_revoked: int = 0
    num_lost: int = 0
    num_commits: int = 0
    commit_s: float = 0.0


class RecordSink(Protocol):
    """Who takes a lane's records and partitions. Every call is made on the event loop."""

    def put(self, lane: str, records: list[Record]) -> None:
        """Takes records, in offset order per partition."""

    def num_queued(self, lane: str) -> int:
        """Records of the lane that wait."""

    def max_queued(self, lane: str) -> int:
        """How many records of the lane may wait."""

    def commit_failed(self, partitions: Sequence[Partition]) -> None:
        """The last commit of these was not taken."""

    async def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Takes on partitions; their records follow."""

    async def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> list[CommitPoint]:
        """Lets go of partitions; returns what to commit for them."""


class LanePoller:
    """Polls one lane in a thread of its own.

    Backpressure: while the sink has ``max_queued`` records nothing is polled. If that lasts, the
    lane's partitions are paused, so that rebalances are heard again, until half of it is left. To
    pause at once would cost half the throughput: librdkafka throws away what it has fetched.

    Args:
        instance_id: this worker's lasting name, if it is a static member of the group.
    """

    def __init__(
        self,
        lane: LaneSettings,
        settings: Settings,
        sink: RecordSink,
        loop: asyncio.AbstractEventLoop,
        instance_id: str | None = None,
    ) -> None:
        self.lane = lane
        self.failure: asyncio.Future[None] = loop.create_future()
        """Fails with what ended the thread, if anything but ``close`` did."""
        self._sink = sink
        self._loop = loop
        self._timeout_s = settings.kafka.timeout_s
        self._retry_deadline_s = settings.worker.retry_deadline_s
        self._release_timeout_s = settings.worker.drain_timeout_s + settings.kafka.timeout_s
        self._handed_over = 0
        self._put = 0
        self.statistics = PollerStatistics()
        self._num_wanted = 0
        self._heard_s = time.monotonic()
        self._commits_begun_s: deque[float] = deque()
        self._to_commit: SimpleQueue[Sequence[CommitPoint]] = SimpleQueue()
        self._closing = threading.Event()
        self._going_back = threading.Event()
        # Cooperative and static together strand partitions: docs/DESIGN.md, 6.
        self._is_eager = bool(instance_id) and settings.worker.group_protocol == "classic"
        self._tells_place = settings.worker.delivery == "exactly_once"
        self._place: object = None
        self._place_noted_s = 0.0
        config = _consumer_config(lane, settings, instance_id) | {"on_commit": self._on_commit}
        self._consumer: Consumer = make_client(Consumer, config)
        self._thread = threading.Thread(target=self._run, name=f"poll-{lane.name}", daemon=True)

    def start(self) -> None:
        """Subscribes and begins to poll."""
        self._consumer.subscribe(
            [self.lane.topic],
            on_assign=self._on_assign,
            on_revoke=self._on_revoke,
            on_lost=self._on_lost,
        )
        self._thread.start()

    def commit(self, points: Sequence[CommitPoint]) -> None:
        """Has the thread send a commit, soon; returns at once."""
        if points:
            self._to_commit.put(points)

    def go_back(self) -> None:
        """Has the thread read again from the last commit, soon; returns at once.

        The sink must have forgotten the lane's partitions already: it is given them anew.
        """
        self._going_back.set()

    def group_metadata(self) -> object:
        """The consumer's place in its group, which offsets in a transaction carry.

        As the thread saw it last: any other that asks waits until ``consume`` returns, and that may
        be for ever (confluent-kafka 2.16). An old answer is safe: the broker refuses it.
        """
        return self._place

    async def close(self) -> None:
        """Leaves the group, which revokes what is assigned, and ends the thread."""
        self._closing.set()
        if self._thread.ident is None:  # it never started
            await asyncio.to_thread(self._consumer.close)
        else:
            await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._adjust_pause()
                self._send_commits()
                if self._going_back.is_set():
                    self._go_back()
                if time.monotonic() - self._place_noted_s > _NOTE_PLACE_EVERY_S:
                    self._note_place()
                if self._num_wanted > 0:
                    self._hand_over(consume_ready(self._consumer, self._num_wanted, _POLL_S))
                else:
                    self._closing.wait(_FULL_S)
            self._consumer.close()
        except BaseException as error:
            _log.error("poller_failed", lane=self.lane.name, error=repr(error))
            self._loop.call_soon_threadsafe(_fail, self.failure, error)

    def _send_commits(self) -> None:
        """Commits without waiting for the answer.

        Only this thread may do it: a call from another one waits until ``consume`` returns, and
        that may be for ever (confluent-kafka 2.16).
        """
        while not self._to_commit.empty():
            self._commit(self._to_commit.get(), asynchronous=True)

    def _commit(self, points: Sequence[CommitPoint], *, asynchronous: Literal[True, False]) -> None:
        offsets = [
            TopicPartition(*one.partition, one.offset, encode_metadata(one)) for one in points
        ]
        if asynchronous:
            self._commits_begun_s.append(time.monotonic())
        try:
            self._consumer.commit(offsets=offsets, asynchronous=asynchronous)
        except KafkaException as error:
            self._on_commit(error.args[0], offsets)

    def _on_commit(self, error: KafkaError | None, partitions: list[TopicPartition]) -> None:
        """librdkafka's answer to a commit. One that was not taken is said again with the next.

        A rebalance refuses them now and then; without it, a partition at rest would stay behind.
        """
        begun_s = self._commits_begun_s.popleft() if self._commits_begun_s else None
        failed = [one for one in partitions if error is not None or one.error]
        if begun_s is not None and not failed:
            self.statistics.num_commits += 1
            self.statistics.commit_s += time.monotonic() - begun_s
        if failed:
            reason = error or failed[0].error
            _log.warning("commit_failed", lane=self.lane.name, error=str(reason))
            self._loop.call_soon_threadsafe(self._sink.commit_failed, _names(failed))

    def _hand_over(self, messages: list[Message]) -> None:
        polled_us = time.time_ns() // 1000
        if any(map(Message.error, messages)):
            messages = [one for one in messages if not self._is_passing(one.error())]
        if messages:
            self._handed_over += len(messages)
            records = records_of(self.lane, messages, polled_us)
            self._loop.call_soon_threadsafe(self._put_records, records)

    def _is_passing(self, error: KafkaError | None) -> bool:
        """Whether there is an error that librdkafka heals by itself. Raises what it cannot heal."""
        if error:
            _raise_unless_passing(error, self.lane)
        return bool(error)

    def _put_records(self, records: list[Record]) -> None:
        self._put += len(records)
        self._sink.put(self.lane.name, records)

    def _adjust_pause(self) -> None:
        """How many records there is room for; where there is none for long, pauses."""
        now_s = time.monotonic()
        limit = self._sink.max_queued(self.lane.name)
        room = limit - self._sink.num_queued(self.lane.name) - (self._handed_over - self._put)
        if room > 0 or self.statistics.paused:
            self._heard_s = now_s
        elif now_s - self._heard_s > _PAUSE_AFTER_S:
            self._consumer.pause(self._consumer.assignment())
            self.statistics.paused = True
        if self.statistics.paused and room >= limit - limit // 2:
            self._consumer.resume(self._consumer.assignment())
            self.statistics.paused = False
        # Paused, whatever is asked for: nothing comes but rebalances.
        self._num_wanted = _MAX_POLLED if self.statistics.paused else min(room, _MAX_POLLED)

    def _note_place(self) -> None:
        if self._tells_place and not self._closing.is_set():
            self._place = self._consumer.consumer_group_metadata()
            self._place_noted_s = time.monotonic()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.statistics.num_assigned += len(partitions)
        # Leaving, it is given away at once, and what is committed is not answered any more.
        starts = partitions if self._closing.is_set() else self._take_on(partitions)
        if self._is_eager:
            consumer.assign(starts)
        else:
            consumer.incremental_assign(starts)
        if self.statistics.paused:
            consumer.pause(partitions)
        self._note_place()

    def _take_on(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """Tells the sink of partitions; returns where to read each of them."""
        committed = self._committed(partitions)
        assignments = [_assignment(one) for one in committed]
        self._on_loop(self._sink.assigned(assignments))
        for one, start in zip(assignments, committed, strict=True):
            # Without a commit, auto.offset.reset says where to begin.
            start.offset = one.replay_from if start.offset >= 0 else OFFSET_INVALID
            _log.info(
                "partition_assigned",
                lane=self.lane.name,
                partition=one.partition,
                live_from=one.live_from,
                replay_from=one.replay_from,
            )
        return committed

    def _committed(self, partitions: list[TopicPartition]) -> list[TopicPartition]:
        """What the group has committed; waits for a transaction that holds an answer back.

        Raises TransientError after ``retry_deadline_s``.
        """
        give_up_s = time.monotonic() + self._retry_deadline_s
        while True:
            try:
                committed: list[TopicPartition] = self._consumer.committed(
                    partitions, timeout=self._timeout_s
                )
            except KafkaException as error:
                if time.monotonic() > give_up_s or self._closing.is_set():
                    reason = error.args[0].str()
                    raise TransientError(
                        f"lane {self.lane.name}: what is committed stays unknown: {reason}"
                    ) from error
                _log.warning("retrying", what="committed", error=error.args[0].str())
                time.sleep(_RETRY_PAUSE_S)
            else:
                return committed

    def _go_back(self) -> None:
        """Begins the assigned partitions again at their last commit, as if newly assigned."""
        self._going_back.clear()
        self._note_place()  # perhaps an old one was why
        partitions = self._consumer.assignment()
        self._let_go(partitions, lost=True)
        for start in self._take_on(partitions):
            if start.offset == OFFSET_INVALID:
                start.offset = OFFSET_BEGINNING
            self._consumer.seek(start)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.statistics.num_revoked += len(partitions)
        if points := self._let_go(partitions, lost=False):
            self._commit(points, asynchronous=False)
        self._unassign(consumer, partitions)
        self._note_place()

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self.statistics.num_lost += len(partitions)
        self._let_go(partitions, lost=True)
        self._unassign(consumer, partitions)

    def _let_go(self, partitions: list[TopicPartition], *, lost: bool) -> list[CommitPoint]:
        """Tells the sink of partitions that go, and returns what to commit for them.

        What still waits to be sent for them is dropped. Sent later it would put the commit back
        behind the last one, this worker's or the next owner's: the broker asks who is in the group,
        not whose the partition is.
        """
        names = _names(partitions)
        points = self._on_loop(self._sink.revoked(names, lost=lost))
        kept: list[CommitPoint] = []
        while not self._to_commit.empty():
            kept += [one for one in self._to_commit.get() if one.partition not in names]
        self.commit(kept)
        return points

    def _unassign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        if self._is_eager:
            consumer.unassign()
        else:
            consumer.incremental_unassign(partitions)

    def _on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the event loop and waits for it.

        Raises TransientError when the loop is too busy to answer: without its answer the thread
        can neither keep the partitions nor let them go.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(self._release_timeout_s)
        except TimeoutError as error:
            raise TransientError(
                f"lane {self.lane.name}: the worker did not let go of partitions within "
                f"{self._release_timeout_s:g} s; it is starved of a processor, or stood still"
            ) from error


def _consumer_config(
    lane: LaneSettings, settings: Settings, instance_id: str | None
) -> dict[str, Any]:
    return client_config(
        settings,
        defaults={
            "client.id": f"tapeline-worker-{lane.name}",
            # Small local queues: what waits in librdkafka is out of the scheduler's sight.
            "queued.min.messages": lane.max_queued_records,
            "queued.max.messages.kbytes": 65_536,
            "fetch.queue.backoff.ms": 10,
            **_fetch_wait(lane.fetch_wait_ms),
            "auto.offset.reset": "earliest",
            "max.poll.interval.ms": int(settings.worker.max_poll_interval_s * 1000),
            **_membership(settings.worker, instance_id),
        },
        required={
            "group.id": lane.group,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "isolation.level": "read_committed",
        },
    )


def _fetch_wait(wait_ms: int) -> dict[str, Any]:
    """Has the broker gather ``_GATHERED`` for at most so long; 0: it answers with one record."""
    return {"fetch.min.bytes": _GATHERED, "fetch.wait.max.ms": wait_ms} if wait_ms else {}


def _membership(worker: WorkerSettings, instance_id: str | None) -> dict[str, Any]:
    """How the consumer belongs to its group; with KIP-848 the broker decides the rest."""
    static = {"group.instance.id": instance_id} if instance_id else {}
    if worker.group_protocol == "consumer":
        return {"group.protocol": "consumer", **static}
    session_ms = int(worker.session_timeout_s * 1000)
    return {
        "partition.assignment.strategy": "range" if instance_id else "cooperative-sticky",
        "session.timeout.ms": session_ms,
        "heartbeat.interval.ms": min(3000, session_ms // 4),
        **static,
    }


def records_of(lane: LaneSettings, messages: Sequence[Message], polled_us: int) -> list[Record]:
    """Attribute by attribute, which takes a fifth of the time of message by message."""
    numbers = list(map(Message.partition, messages))
    partitions = {number: (lane.topic, number) for number in set(numbers)}
    columns = (
        [partitions[number] for number in numbers],
        map(Message.offset, messages),
        map(Message.key, messages),
        map(Message.value, messages),
        all_headers(messages),
        [timestamp_ms * 1000 for _, timestamp_ms in map(Message.timestamp, messages)],
    )
    return list(map(Record._make, zip(repeat(lane.name), *columns, repeat(polled_us))))


def _assignment(committed: TopicPartition) -> Assignment:
    if committed.error:
        raise TransientError(f"no committed offset of {committed.topic}: {committed.error}")
    live_from = max(committed.offset, 0)
    replay_from = decode_metadata(committed.metadata, live_from)
    return Assignment((committed.topic, committed.partition), live_from, replay_from)


def _names(partitions: Sequence[TopicPartition]) -> list[Partition]:
    return [(one.topic, one.partition) for one in partitions]


def _raise_unless_passing(error: KafkaError, lane: LaneSettings) -> None:
    if error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED):
        raise ConfigError(
            f"lane {lane.name}: {error.str()}; create its topics with `tapeline topics --create`"
        )
    # As a message it has the code, and does not call itself fatal (confluent-kafka 2.16). Nothing
    # comes from this consumer any more.
    if error.fatal() or error.code() == KafkaError._FATAL:
        raise TapelineError(f"lane {lane.name}: {error.str()}; start this worker again")
    _log.warning("poll_error", lane=lane.name, error=error.str())


def _fail(future: asyncio.Future[None], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
