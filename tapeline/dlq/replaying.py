"""Letters back to where they came from. A letter is closed only after its replay is acknowledged.

A crash between acknowledgement and receipt leaves the letter open, so a later replay sends it once
more; the worker's duplicate filter drops that one.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from consumers.envelopes import ATTEMPTS_HEADER, REPLAYED_FROM_HEADER
from schemas.kafka import IDEMPOTENT, Deliveries, client_config, make_client
from schemas.settings import Settings
from tapeline.clients import check_kafka
from tapeline.dlq.letters import Closed, Letter, LetterId, Unreadable, receipt_headers

_STEP_S = 0.1  # of a wait in librdkafka: how long Ctrl-C may have to wait
_MAX_MESSAGE_BYTES = 17 * 2**20  # an original of 16 MiB, and the headers that are added
_MAX_SHOWN = 10
_ITS_OWN_FAULT = frozenset(
    (
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.INVALID_RECORD,
        KafkaError.POLICY_VIOLATION,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
        KafkaError._UNKNOWN_PARTITION,
    )
)
"""What is wrong with one letter or its topic; anything else is wrong with the cluster."""


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """What came of a replay. Every letter that is not among ``num_replayed`` is open as before.

    Attributes:
        num_replayed: acknowledged by all in-sync replicas.
        num_unmarked: of those, the ones whose receipt was not: they still look open.
        num_failed: not acknowledged, or of no known topic.
        first_failures: why, of the first few.
        interrupted: Ctrl-C, or the cluster, ended it early.
    """

    num_replayed: int
    num_unmarked: int
    num_failed: int
    first_failures: tuple[str, ...]
    interrupted: bool


def replayed_headers(letter: Letter) -> list[tuple[str, bytes | None]]:
    """The original's headers in their order; how often it failed, and where it did last.

    The worker's first-seen table lets a replay take the place of that very record, once.
    """
    ours = (ATTEMPTS_HEADER, REPLAYED_FROM_HEADER)
    kept = [one for one in letter.dead.headers if one[0] not in ours]
    attempts = str(letter.dead.attempts).encode()
    return [*kept, (ATTEMPTS_HEADER, attempts), (REPLAYED_FROM_HEADER, letter.source.encode())]


def replay(
    settings: Settings,
    letters: Iterable[Letter | Unreadable],
    *,
    rate_hz: float | None = None,
    delivery_timeout_s: float = 30,
    progress: Callable[[int], None] | None = None,
) -> ReplayReport:
    """Sends letters to their original topics, in order, and writes a receipt for each that arrived.

    Blocks until all are acknowledged or have failed. A letter that its topic refuses is counted,
    and the rest goes on; when the cluster fails, or on KeyboardInterrupt, no more are sent, what
    is on its way is waited for, and the rest stays open.

    Args:
        letters: as ``read_letters`` gives them; may be lazy. Unreadable records count as failed.
        rate_hz: at most so many a second; None: as fast as it goes.
        progress: called with how many are done.

    Raises ConfigError if no broker answers.
    """
    if rate_hz is not None:
        assert rate_hz > 0
    run = _Replay(settings, check_kafka(settings), delivery_timeout_s, progress)
    # Ctrl-C reaches the main thread alone: in the middle of a callback it would lose an answer.
    with ThreadPoolExecutor(1, "replay") as thread:
        sending = thread.submit(run.send_all, letters, 1 / rate_hz if rate_hz else 0.0)
        try:
            sending.result()
        except KeyboardInterrupt:
            run.stopping.set()
            sending.result()
    return ReplayReport(
        run.num_replayed,
        run.num_replayed - run.receipts.num_written,
        run.num_failed,
        tuple(run.first_failures),
        run.stopping.is_set() or run.cluster_failed,
    )


class _Replay:
    """One producer for letters and receipts. Its callbacks run within ``wait_until``, ``send``."""

    def __init__(
        self,
        settings: Settings,
        topics: Collection[str],
        delivery_timeout_s: float,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._topics = topics
        self._progress = progress
        self._producer = make_producer(settings, delivery_timeout_s)
        self._deliveries = Deliveries()
        self.receipts = Receipts(self._producer, settings)
        self.num_replayed = self.num_failed = 0
        self.first_failures: list[str] = []
        self.cluster_failed = False
        self.stopping = threading.Event()

    def send_all(self, letters: Iterable[Letter | Unreadable], pause_s: float) -> None:
        """Sends until there are no more, or no more shall be sent, and waits for the answers."""
        due_s = time.monotonic()
        try:
            for letter in letters:
                self.wait_until(due_s)
                if self.cluster_failed or self.stopping.is_set():
                    break
                self.send(letter)
                due_s = max(due_s, time.monotonic() - pause_s) + pause_s
        except KeyboardInterrupt:  # raised by what gives the letters
            self.stopping.set()
        self.finish()

    def wait_until(self, due_s: float) -> None:
        """Serves callbacks and writes receipts, at least once, until it is time."""
        while True:
            left_s = due_s - time.monotonic()
            self._producer.poll(min(max(left_s, 0), _STEP_S))
            self.receipts.write()
            if left_s <= 0 or self.stopping.is_set():
                return

    def send(self, letter: Letter | Unreadable) -> None:
        """Blocks while librdkafka's queue is full."""
        if isinstance(letter, Unreadable):
            self._fail(letter.id, f"it cannot be read: {letter.why}")
            return
        dead = letter.dead
        if dead.source_topic not in self._topics:  # and none is made by sending to it
            self._fail(letter.id, f"its topic {dead.source_topic} does not exist")
            return
        answer = partial(self._answer, letter.id)
        try:
            produce(
                self._producer,
                lambda: self._producer.produce(
                    dead.source_topic,
                    dead.value,
                    dead.key,
                    headers=[*replayed_headers(letter)],
                    on_delivery=answer,
                ),
            )
        except KafkaException as error:
            self._refuse(letter.id, error.args[0])

    def finish(self) -> None:
        """Blocks until everything sent is acknowledged or has failed, receipts included."""
        while self._producer.flush(_STEP_S) or self.receipts.write():
            pass

    def _answer(self, id: LetterId, error: KafkaError | None, message: Message) -> None:
        if (error := self._deliveries.error(error, message)) is not None:
            self._refuse(id, error)
            return
        self.receipts.put(id, "replayed")
        self.num_replayed += 1
        self._show()

    def _refuse(self, id: LetterId, error: KafkaError) -> None:
        self.cluster_failed |= error.code() not in _ITS_OWN_FAULT
        self._fail(id, error.str())

    def _fail(self, id: LetterId, why: str) -> None:
        self.num_failed += 1
        if len(self.first_failures) < _MAX_SHOWN:
            self.first_failures.append(f"{id}: {why}")
        self._show()

    def _show(self) -> None:
        if self._progress is not None:
            self._progress(self.num_replayed + self.num_failed)


class Receipts:
    """Receipts on their way to the DLQ topics, each to its letter's partition.

    ``put`` may be called from a delivery callback; ``write`` hands over what was put.
    """

    def __init__(self, producer: Producer, settings: Settings) -> None:
        self._producer = producer
        self._deliveries = Deliveries()
        self._topics = {lane.name: lane.dlq_topic for lane in settings.active_lanes}
        self._waiting: deque[tuple[LetterId, Closed]] = deque()
        self.num_written = 0
        self.failure: KafkaError | None = None

    def put(self, id: LetterId, state: Closed) -> None:
        self._waiting.append((id, state))

    def write(self) -> int:
        """Returns how many were handed to librdkafka. Blocks while its queue is full."""
        num_handed = 0
        while self._waiting:
            (lane, partition, offset), state = self._waiting.popleft()
            topic = self._topics[lane]
            try:
                produce(
                    self._producer,
                    partial(
                        self._producer.produce,
                        topic,
                        partition=partition,
                        headers=[*receipt_headers(offset, state)],
                        on_delivery=self._answer,
                    ),
                )
            except KafkaException as error:
                self.failure = error.args[0]
            num_handed += 1
        return num_handed

    def _answer(self, error: KafkaError | None, message: Message) -> None:
        if (error := self._deliveries.error(error, message)) is None:
            self.num_written += 1
        else:
            self.failure = error


def make_producer(settings: Settings, delivery_timeout_s: float) -> Producer:
    """An idempotent producer whose queue holds at most 64 MiB."""
    producer: Producer = make_client(
        Producer,
        client_config(
            settings,
            defaults={
                "client.id": "tapeline-dlq",
                "linger.ms": 1,
                "delivery.timeout.ms": int(delivery_timeout_s * 1000),
                "message.max.bytes": _MAX_MESSAGE_BYTES,
                "queue.buffering.max.kbytes": 65_536,
                # A broker that refuses one record refuses its whole batch: one letter, one batch.
                "batch.num.messages": 1,
            },
            required=IDEMPOTENT,
        ),
    )
    return producer


def produce(producer: Producer, hand_over: Callable[[], None]) -> None:
    """Calls ``hand_over``, again while the queue is full. Raises KafkaException."""
    while True:
        try:
            hand_over()
        except BufferError:
            producer.poll(_STEP_S)
        else:
            return
