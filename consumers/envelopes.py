"""What a worker sends: features and dead letters as Kafka messages, headers included."""

from consumers.budget import BatchTimes, timing_header
from consumers.parcels import Outgoing
from consumers.records import Record
from consumers.tracing import TRACE_HEADER, EventTrace
from inference.client import Inference
from schemas.codec import Codec
from schemas.errors import PoisonRecord
from schemas.lanes import LaneSettings
from schemas.messages import DeadLetter, FeatureVector, Flags, MarketEvent

SOURCE_APPENDED_HEADER = "source-appended-us"
ATTEMPTS_HEADER = "dlq-attempts"
"""On a replayed record: how often it has failed before, in decimal."""
REPLAYED_FROM_HEADER = "dlq-replayed-from"
"""On a replayed record: ``topic:partition:offset`` of the record that failed."""


class Envelopes:
    """Makes the messages of one worker.

    Args:
        channels_version: of the windows that the features come from.
        score_names: of the model's scores, in their order.
        says_timing: features carry where their time went, in a header.
    """

    def __init__(
        self,
        codec: Codec,
        channels_version: str,
        score_names: tuple[str, ...],
        *,
        says_timing: bool = False,
    ) -> None:
        self._codec = codec
        self._channels_version = channels_version
        self._score_names = score_names
        self._says_timing = says_timing

    def feature(
        self,
        lane: LaneSettings,
        record: Record,
        event: MarketEvent,
        inference: Inference,
        row: int,
        flags: Flags,
        times: BatchTimes,
        trace: EventTrace | None = None,
    ) -> Outgoing:
        """The feature of one event: row ``row`` of ``inference``. Keyed by symbol.

        Carries when its event was appended and, if there is one, the event's trace: as this worker
        goes on with it, or as it came.
        """
        topic, number = record.partition
        scores = zip(self._score_names, inference.scores[row].tolist(), strict=True)
        feature = FeatureVector(
            event_id=event.event_id,
            symbol=event.symbol,
            venue=event.venue,
            event_time_us=event.event_time_us,
            lane=lane.name,
            model_version=inference.model_version,
            channels_version=self._channels_version,
            source_topic=topic,
            source_partition=number,
            source_offset=record.offset,
            features=inference.features[row],
            scores=dict(scores),
            flags=flags,
        )
        value, headers = self._codec.encode_feature(feature)
        appended = (SOURCE_APPENDED_HEADER, str(record.appended_us).encode())
        more: list[tuple[str, bytes | None]] = (
            [trace.header()] if trace else [one for one in record.headers if one[0] == TRACE_HEADER]
        )
        if self._says_timing:
            more.append(timing_header(record, times))
        return Outgoing(
            lane.output_topic, event.symbol.encode(), value, [*headers, appended, *more]
        )

    def dead_letter(
        self,
        lane: LaneSettings,
        record: Record,
        poison: PoisonRecord,
        failed_at_us: int,
        model_version: str,
    ) -> Outgoing:
        """A poison record, untouched, with headers that say why without decoding anything.

        A record that was replayed out of the DLQ has its attempts counted on.
        """
        topic, number = record.partition
        letter = DeadLetter(
            key=record.key,
            value=record.value,
            headers=record.headers,
            source_topic=topic,
            source_partition=number,
            source_offset=record.offset,
            lane=lane.name,
            stage=poison.stage,
            reason=poison.reason,
            error_class=type(poison.__cause__ or poison).__name__,
            message=str(poison),
            attempts=1 + _former_attempts(record),
            failed_at_us=failed_at_us,
            model_version=model_version if poison.stage == "infer" else None,
        )
        value, headers = self._codec.encode_dead_letter(letter)
        why = [
            ("dlq-stage", poison.stage),
            ("dlq-reason", poison.reason),
            ("dlq-message", str(poison)),
            ("dlq-source", record.source),
        ]
        named = [(name, text.encode()) for name, text in why]
        return Outgoing(lane.dlq_topic, record.key, value, [*headers, *named])


def _former_attempts(record: Record) -> int:
    for name, value in record.headers:
        if name == ATTEMPTS_HEADER and value and value.isdigit() and len(value) < 9:
            return int(value)
    return 0
