"""The way out, exactly once: a lane's features and offsets end in one Kafka transaction.

Work-conserving group commit: while a transaction ends, parcels gather for the next one. No timer
holds a lone parcel back, except ``transaction_interval_ms`` since the lane's last transaction.

Zombies are fenced twice: by the group's generation, which travels with the offsets, and by the
``transactional.id``, which belongs to one worker at a time.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, TopicPartition

from consumers.offsets import encode_metadata
from consumers.parcels import Outgoing, Parcel
from consumers.publisher import make_producer, try_produce
from consumers.records import CommitPoint
from schemas.errors import AssignmentLost, ConfigError, TapelineError, TransientError
from schemas.kafka import Deliveries
from schemas.lanes import LaneSettings
from schemas.settings import Settings

_log = structlog.get_logger(__name__)
_RETRY_PAUSE_S = 0.05
_HANG_MARGIN_S = 3.0  # past its own timeout a call will not return any more
_LOOK_EVERY_S = 1.0
_MOCK_CLUSTER = "mockCluster"  # how librdkafka's mock broker names its cluster


@dataclass(frozen=True, slots=True)
class TransactionStatistics:
    """A snapshot of one lane's transactions since the start.

    Attributes:
        committed_s: the seconds that those took that were committed.
    """

    committed_total: int
    aborted_total: int
    committed_s: float = 0.0


class LaneTransactions:
    """The outlet of ``exactly_once`` for one lane: a transactional producer and its thread.

    Args:
        group_metadata: the consumer's place in its group, now; the broker refuses offsets from a
            place that is no longer held.
        void: called when a transaction was aborted, before anything else of the lane is sent: it
            must close every assignment of the lane and have the consumer go back.
    """

    def __init__(
        self,
        lane: LaneSettings,
        settings: Settings,
        instance_id: str,
        *,
        group_metadata: Callable[[], object],
        void: Callable[[], None],
    ) -> None:
        worker = settings.worker
        self._lane = lane.name
        self._group_metadata = group_metadata
        self._void = void
        self._interval_s = worker.transaction_interval_ms / 1000
        self._deadline_s = worker.retry_deadline_s
        self._request_timeout_s = settings.kafka.timeout_s
        self._id = f"{lane.group}.{instance_id}"
        timeout_ms = int(worker.transaction_timeout_s * 1000)
        self._producer = make_producer(
            settings,
            {
                "client.id": f"tapeline-worker-{lane.name}",
                "transactional.id": self._id,
                "transaction.timeout.ms": timeout_ms,
                "delivery.timeout.ms": min(timeout_ms, int(self._deadline_s * 1000)),
                "linger.ms": 0,
                # The broker is still ending the last transaction when the next one begins, and says
                # so; librdkafka's 100 ms before it asks again would be most of the latency.
                "retry.backoff.ms": 5,
            },
        )
        self._deliveries = Deliveries()
        self._thread = ThreadPoolExecutor(1, f"transact-{lane.name}")
        self._waiting: deque[Parcel] = deque()
        self._arrived = asyncio.Event()
        self._failing_since_s: float | None = None
        self._calling_since_s: float | None = None
        self._committed_total = self._aborted_total = 0
        self._committed_s = 0.0

    async def open(self) -> None:
        """Fences whoever had this ``transactional.id`` and ends the transaction it left open.

        Raises ConfigError on librdkafka's mock broker, whose transactions are hollow.
        """
        await self._on_thread(self._open)

    async def run(self) -> None:
        """One transaction after another, of all that has gathered.

        Raises TapelineError when it is fenced, TransientError when none has ended well for
        ``retry_deadline_s``.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            earliest_next_s = loop.time() + self._interval_s
            await self._transact_waiting()
            await asyncio.sleep(earliest_next_s - loop.time())

    async def send(self, parcel: Parcel) -> None:
        """Leaves it for the next transaction; the worker bounds how many wait."""
        self._waiting.append(parcel)
        self._arrived.set()

    async def close(self, timeout_s: float) -> None:
        """Aborts what is under way, and ends the thread, unless it hangs."""
        try:
            async with asyncio.timeout(0 if self._hangs() else timeout_s):
                await self._on_thread(self._close)
        except TimeoutError:
            _log.warning("transaction_left_open", lane=self._lane, transactional_id=self._id)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def statistics(self) -> TransactionStatistics:
        """A snapshot."""
        return TransactionStatistics(self._committed_total, self._aborted_total, self._committed_s)

    async def _transact_waiting(self) -> None:
        parcels = self._take()
        if not parcels:
            return
        messages = [message for parcel in parcels for message in parcel.messages]
        ends = {parcel.progress: parcel.span.end for parcel in parcels}  # the last one's counts
        points = [progress.point_at(end) for progress, end in ends.items()]
        # The place is asked for while every one of these assignments is ours. Later the answer
        # might name a place that we hold without them, and the broker would let them through.
        place = self._group_metadata()
        begun_s = time.monotonic()
        try:
            await self._watched(self._on_thread(self._transact, messages, points, place))
        except AssignmentLost as error:
            self._note_abort(error)
            self._void()
            self._resolve(parcels, delivered=False)
        else:
            self._committed_total += 1
            self._committed_s += time.monotonic() - begun_s
            self._failing_since_s = None
            self._resolve(parcels, delivered=True)

    def _take(self) -> list[Parcel]:
        """All that waits, but for what is void by now."""
        parcels, self._waiting = self._waiting, deque()
        self._resolve([one for one in parcels if one.progress.closed], delivered=False)
        return [parcel for parcel in parcels if not parcel.progress.closed]

    @staticmethod
    def _resolve(parcels: Sequence[Parcel], *, delivered: bool) -> None:
        for parcel in parcels:
            parcel.delivered.set_result(delivered)

    def _note_abort(self, error: AssignmentLost) -> None:
        self._aborted_total += 1
        _log.warning("transaction_aborted", lane=self._lane, error=str(error))
        now_s = asyncio.get_running_loop().time()
        self._failing_since_s = self._failing_since_s or now_s
        if now_s - self._failing_since_s > self._deadline_s:
            raise TransientError(
                f"lane {self._lane}: no transaction has ended well for {self._deadline_s:g} s; "
                f"the last one: {error}"
            ) from error

    async def _watched(self, call: Coroutine[Any, Any, None]) -> None:
        """Waits for a call, but not for one that librdkafka never returns from.

        When a broker restarts, ``send_offsets_to_transaction`` may wait for ever, whatever its
        timeout (librdkafka 2.16). Raises TransientError: only a new process is rid of it.
        """
        running = asyncio.create_task(call)
        while not running.done():
            await asyncio.wait([running], timeout=_LOOK_EVERY_S)
            if self._hangs():
                raise TransientError(
                    f"lane {self._lane}: the Kafka client does not return from a transaction; "
                    "start the worker again"
                )
        await running

    def _hangs(self) -> bool:
        since_s = self._calling_since_s
        limit_s = self._request_timeout_s + _HANG_MARGIN_S
        return since_s is not None and time.monotonic() - since_s > limit_s

    async def _on_thread(self, call: Callable[..., Any], *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, call, *args)

    # In the thread.

    def _open(self) -> None:
        try:
            cluster_id = self._producer.list_topics(timeout=self._request_timeout_s).cluster_id
            if str(cluster_id).startswith(_MOCK_CLUSTER):
                raise ConfigError(
                    "worker.delivery cannot be exactly_once on librdkafka's mock broker, whose "
                    "transactions are hollow; use at_least_once, or a real Kafka (`tapeline up`)"
                )
            self._retrying(lambda: self._producer.init_transactions(self._request_timeout_s))
        except KafkaException as error:
            reason: KafkaError = error.args[0]
            raise TransientError(f"lane {self._lane}: no transactions: {reason.str()}") from error

    def _close(self) -> None:
        try:
            self._producer.close()
        except KafkaException as error:  # a fenced producer does not even close in order
            _log.warning("transactions_closed", lane=self._lane, error=error.args[0].str())

    def _transact(
        self, messages: Sequence[Outgoing], points: Sequence[CommitPoint], place: object
    ) -> None:
        offsets = [
            TopicPartition(*one.partition, one.offset, encode_metadata(one)) for one in points
        ]
        timeout_s = self._request_timeout_s
        try:
            self._producer.begin_transaction()
            failures = self._produce(messages)
            self._retrying(
                lambda: self._producer.send_offsets_to_transaction(offsets, place, timeout_s)
            )
            self._retrying(self._flush)
            if failures:
                raise KafkaException(failures[0])
            self._retrying(lambda: self._producer.commit_transaction(timeout_s))
        except KafkaException as error:
            raise self._abort(error.args[0]) from error

    def _produce(self, messages: Sequence[Outgoing]) -> Sequence[KafkaError]:
        """Queues the messages; their failures are known once they are flushed.

        Of those that share a key, and so a partition, only the first is asked after. Whatever else
        fails fails the commit; a loss that librdkafka calls a delivery takes a partition's first.
        """
        failures: list[KafkaError] = []

        def note(error: KafkaError | None, message: Message) -> None:
            if error := self._deliveries.error(error, message):
                failures.append(error)

        known: set[tuple[str, bytes | None]] = set()
        for message in messages:
            place = message[:2]  # topic and key
            asked = not place[1] or place not in known
            known.add(place)
            while not try_produce(self._producer, message, note if asked else None):
                self._producer.poll(_RETRY_PAUSE_S)
        return failures

    def _flush(self) -> None:
        if num_left := self._producer.flush(self._request_timeout_s):
            text = f"{num_left} records are not acknowledged"
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT, text, retriable=True))

    def _retrying(self, call: Callable[[], None]) -> None:
        """Calls until it is done: what librdkafka calls retriable goes on where it stopped."""
        give_up_s = time.monotonic() + self._deadline_s
        while True:
            self._calling_since_s = time.monotonic()
            try:
                return call()
            except KafkaException as error:
                reason: KafkaError = error.args[0]
                if not reason.retriable() or reason.txn_requires_abort():
                    raise
                if time.monotonic() > give_up_s:
                    raise TransientError(
                        f"lane {self._lane}: its transaction does not end: {reason.str()}"
                    ) from error
                _log.warning("retrying", what="transaction", error=reason.str())
            finally:
                self._calling_since_s = None
            time.sleep(_RETRY_PAUSE_S)

    def _abort(self, reason: KafkaError) -> TapelineError:
        """Ends the transaction without effect; the error that says what this means for us."""
        if not reason.fatal():
            try:
                self._retrying(lambda: self._producer.abort_transaction(self._request_timeout_s))
            except KafkaException as error:
                reason = error.args[0]
            else:
                return AssignmentLost(reason.str())
        return TapelineError(
            f"lane {self._lane}: {self._id} is fenced ({reason.str()}): another worker has its "
            "name, or it stood still for longer than worker.transaction_timeout_s; give every "
            "worker its own worker.instance_id, and start this one again"
        )
