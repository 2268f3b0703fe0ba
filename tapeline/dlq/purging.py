"""Letters put away: receipts for what nobody wants again, closed letters off the broker."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from confluent_kafka import TopicPartition

from schemas.errors import TransientError
from schemas.settings import Settings
from tapeline.clients import ask_broker, make_admin
from tapeline.dlq.index import LeadingRun, Place, fold
from tapeline.dlq.letters import LetterId, Selection
from tapeline.dlq.reading import read_records, snapshot
from tapeline.dlq.replaying import Receipts, make_producer
from tapeline.reading import ShowProgress


@dataclass(frozen=True, slots=True)
class Deletion:
    """What left the broker, or would.

    Attributes:
        num_records: letters and receipts.
        num_kept: closed letters that stay, because an open one is in front of them.
    """

    num_records: int
    num_kept: int


def mark_purged(
    settings: Settings, ids: Iterable[LetterId], *, delivery_timeout_s: float = 30
) -> int:
    """Closes letters, and unreadable records, for good. Returns how many; blocks until all are.

    Raises TransientError if the broker did not take a receipt; the others are written.
    """
    producer = make_producer(settings, delivery_timeout_s)
    receipts = Receipts(producer, settings)
    for id in ids:
        receipts.put(id, "purged")
        receipts.write()
        producer.poll(0)
    producer.flush()
    if receipts.failure is not None:
        raise TransientError(
            f"{receipts.num_written} letters are marked, then the broker took no more receipts: "
            f"{receipts.failure.str()}; the rest is open as before, so run it again"
        )
    return receipts.num_written


def delete_closed(
    settings: Settings,
    lanes: Collection[str] = (),
    *,
    closing: Collection[LetterId] = frozenset(),
    dry_run: bool = False,
    progress: ShowProgress | None = None,
) -> Deletion:
    """Takes closed letters and receipts off the broker, from each partition's beginning.

    Kafka deletes only from the front, so it stops at the first open letter or unreadable record
    that is not closed, and never takes one.

    Args:
        lanes: of these only; none: all that are enabled.
        closing: with ``dry_run``, counts these as closed.

    Raises:
        ConfigError: no broker, no such lane, no such topic.
        TransientError: the broker fell silent, or did not delete.
    """
    assert dry_run or not closing
    selection = Selection(lanes=tuple(lanes))
    spans = snapshot(settings, selection)
    index = fold(read_records(settings, spans, progress))
    runs = {place: index.leading_run(place, span.end, closing) for place, span in spans.items()}
    runs = {place: run for place, run in runs.items() if run.num_records}
    if runs and not dry_run:
        _delete(settings, runs)
    closed = {*index.ids("replayed", "purged"), *closing}
    num_kept = sum(
        (place := (lane, partition)) not in runs or offset >= runs[place].before
        for lane, partition, offset in closed
    )
    return Deletion(sum(run.num_records for run in runs.values()), num_kept)


def _delete(settings: Settings, runs: dict[Place, LeadingRun]) -> None:
    topics = {lane: settings.lane(lane).dlq_topic for lane, _ in runs}
    wanted = [
        TopicPartition(topics[lane], partition, run.before)
        for (lane, partition), run in runs.items()
    ]
    admin = make_admin(settings)  # held until its futures are done
    timeout_s = settings.kafka.timeout_s

    def ask() -> None:
        for future in admin.delete_records(wanted, request_timeout=timeout_s).values():
            future.result(timeout_s + 1)

    ask_broker(ask, "that it deleted the records", settings)
