"""OpenTelemetry traces of sampled events: where one event's time went, across systems.

A trace that comes in a record's ``traceparent`` goes on through the worker and out with the
feature. Spans are made when all of their times are known, so an event that is not sampled costs a
look at a header or one random number.
"""

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation import set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from consumers.budget import BatchTimes
from consumers.records import Record
from schemas.sla import TracingSettings
from schemas.timing import STAGES

TRACE_HEADER = "traceparent"

_SAMPLED_LENGTH = 55  # of version 00
_NAME = "tapeline.worker"
_propagator = TraceContextTextMapPropagator()


class EventTrace:
    """The trace of one event, from its append until its feature is durable."""

    def __init__(
        self, tracer: Tracer, record: Record, times: BatchTimes, parent: Context, batch: SpanContext
    ) -> None:
        self._tracer = tracer
        self._passed_us = [record.appended_us, record.polled_us, *times]
        self._batch = batch
        topic, partition = record.partition
        self._span = tracer.start_span(
            f"process {topic}",
            context=parent,
            kind=SpanKind.CONSUMER,
            start_time=record.appended_us * 1000,
            attributes={
                "messaging.system": "kafka",
                "messaging.operation.type": "process",
                "messaging.destination.name": topic,
                "messaging.destination.partition.id": str(partition),
                "messaging.kafka.offset": record.offset,
                "tapeline.lane": record.lane,
            },
        )

    @property
    def context(self) -> SpanContext:
        return self._span.get_span_context()

    def header(self) -> tuple[str, bytes]:
        """What the feature carries, so that its readers go on."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, set_span_in_context(self._span))
        return TRACE_HEADER, carrier[TRACE_HEADER].encode()

    def end(self, durable_us: int) -> None:
        """A child for each stage; ``model`` is linked to the micro-batch that it was part of."""
        ends_us = [*self._passed_us[1:], durable_us]
        parent = set_span_in_context(self._span)
        for stage, begun_us, ended_us in zip(STAGES, self._passed_us, ends_us, strict=True):
            links = [Link(self._batch)] if stage == "model" else []
            span = self._tracer.start_span(
                stage, context=parent, start_time=begun_us * 1000, links=links
            )
            span.end(ended_us * 1000)
        self._span.end(durable_us * 1000)

    def abandon(self, now_us: int) -> None:
        """Its partition was taken away: its next owner does it again."""
        self._span.set_status(Status(StatusCode.ERROR, "the partition was taken away"))
        self._span.end(now_us * 1000)


class Tracing:
    """Decides which events are traced, and makes their spans.

    Args:
        tracer: samples all that it is asked for.
        sample_ratio: of the events without a trace of their own; one that has is traced if its
            flags say so.
        close: sends what is left.
    """

    def __init__(
        self, tracer: Tracer, sample_ratio: float, close: Callable[[], None] = lambda: None
    ) -> None:
        self._tracer = tracer
        self._sample_ratio = sample_ratio
        self._random = random.Random()
        self.close = close

    @contextmanager
    def batch(self, num_windows: int, times: BatchTimes) -> Iterator["BatchTrace"]:
        """One micro-batch: its span is linked to those of its events that are traced, if any."""
        batch = BatchTrace(self._tracer, self._is_sampled, num_windows, times)
        yield batch
        batch.end()

    def _is_sampled(self, parent: bytes | None) -> bool:
        if parent is None or len(parent) != _SAMPLED_LENGTH:
            return self._random.random() < self._sample_ratio
        return parent[-1:] in b"13579bdfBDF"


class BatchTrace:
    """The events of one micro-batch that are traced."""

    def __init__(
        self,
        tracer: Tracer,
        is_sampled: Callable[[bytes | None], bool],
        num_windows: int,
        times: BatchTimes,
    ) -> None:
        self._tracer = tracer
        self._is_sampled = is_sampled
        self._num_windows = num_windows
        self._times = times
        self._span: Span | None = None

    def begin(self, record: Record) -> EventTrace | None:
        """None: this one is not."""
        parent = next((value for name, value in record.headers if name == TRACE_HEADER), None)
        if not self._is_sampled(parent):
            return None
        carrier = {TRACE_HEADER: parent.decode(errors="replace")} if parent else {}
        if self._span is None:
            self._span = self._tracer.start_span(
                "micro-batch",
                context=Context(),
                start_time=self._times.taken_us * 1000,
                attributes={"tapeline.windows": self._num_windows},
            )
        trace = EventTrace(
            self._tracer,
            record,
            self._times,
            _propagator.extract(carrier, Context()),
            self._span.get_span_context(),
        )
        self._span.add_link(trace.context)
        return trace

    def end(self) -> None:
        if self._span is not None:
            self._span.end(self._times.answered_us * 1000)


def open_tracing(settings: TracingSettings) -> Tracing | None:
    """What the settings ask for; None: nothing.

    Spans go by OTLP over HTTP where OTEL_EXPORTER_OTLP_ENDPOINT and the other standard variables
    say.
    """
    if not settings.enabled:
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ALWAYS_ON

    # $OTEL_SERVICE_NAME and $OTEL_RESOURCE_ATTRIBUTES go before ours.
    named = "OTEL_SERVICE_NAME" in os.environ
    resource = Resource.create({} if named else {"service.name": "tapeline-worker"})
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider.get_tracer(_NAME), settings.sample_ratio, provider.shutdown)
