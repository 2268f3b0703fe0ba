"""What a worker sends: features and dead letters as Kafka messages, headers included."""

from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from consumers.budget import BatchTimes, timing_header
from consumers.encoding import FeatureEncoder, Sources
from consumers.items import Items, appended_us_of, headers_of, offset_of, partition_of
from consumers.parcels import Outgoing
from consumers.records import Record
from consumers.tracing import TRACE_HEADER, EventTrace
from inference.client import Inference
from schemas.codec import Codec
from schemas.errors import PoisonRecord
from schemas.lanes import LaneSettings
from schemas.messages import DeadLetter

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
        self._features = FeatureEncoder(codec, channels_version, score_names)
        self._says_timing = says_timing

    def features(
        self,
        lane: LaneSettings,
        items: Items,
        inference: Inference,
        rows: Sequence[int],
        flags: NDArray[np.uint8],
        times: BatchTimes,
        traces: Sequence[EventTrace | None] = (),
    ) -> list[Outgoing]:
        """The features of events of one lane: those rows of ``inference``. Keyed by symbol.

        A feature carries its event's trace, if there is one: as this worker goes on with it, or as
        it came.
        """
        records = items.records
        sources = Sources(
            items.events.heads,
            [number for _, number in map(partition_of, records)],
            list(map(offset_of, records)),
            list(map(appended_us_of, records)),
        )
        values = self._features.encode(lane.name, lane.topic, sources, inference, rows, flags)
        headers: Iterable[Sequence[tuple[str, bytes | None]]] = repeat(())
        if traces or self._says_timing or any(map(headers_of, records)):
            known = traces or [None] * len(records)
            headers = [self._headers(*pair, times) for pair in zip(records, known, strict=True)]
        keys = items.events.keys
        return list(zip(repeat(lane.output_topic), keys, values, headers, strict=False))

    def _headers(
        self, record: Record, trace: EventTrace | None, times: BatchTimes
    ) -> list[tuple[str, bytes | None]]:
        headers: list[tuple[str, bytes | None]] = (
            [trace.header()] if trace else [one for one in record.headers if one[0] == TRACE_HEADER]
        )
        if self._says_timing:
            headers.append(timing_header(record, times))
        return headers

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
        value = self._codec.encode_dead_letter(letter)
        why = [
            ("dlq-stage", poison.stage),
            ("dlq-reason", poison.reason),
            ("dlq-message", str(poison)),
            ("dlq-source", record.source),
        ]
        named: list[tuple[str, bytes | None]] = [(name, text.encode()) for name, text in why]
        return lane.dlq_topic, record.key, value, named


def _former_attempts(record: Record) -> int:
    for name, value in record.headers:
        if name == ATTEMPTS_HEADER and value and value.isdigit() and len(value) < 9:
            return int(value)
    return 0
