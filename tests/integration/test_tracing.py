"""Traces go through a worker: in by a header, out by a header, spans by OTLP to a collector."""

import itertools
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from pipeline import features, running_worker

from inference.engine import Engine
from inference.model import ModelConfig
from inference.seeded import seeded_artifact
from schemas.settings import Settings
from schemas.timing import STAGES
from tapeline.producer import MarketEventProducer
from tapeline.simulator import simulate, symbol_names
from tapeline.subscriber import FeatureRecord
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
NUM_EVENTS = 70
NUM_FEATURES = NUM_EVENTS - 59
SAMPLED, UNSAMPLED = b"01", b"00"


class Collector:
    """Takes spans by OTLP over HTTP, as Jaeger, Tempo or the OpenTelemetry collector do."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    collector.services |= {
                        one.value.string_value
                        for one in resource.resource.attributes
                        if one.key == "service.name"
                    }
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Not a line for every request."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    endpoint = f"http://127.0.0.1:{collector.server.server_port}"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def parent(number: int, flags: bytes) -> bytes:
    """A W3C traceparent; its trace is the event's number."""
    return b"00-%032x-%016x-%s" % (number + 1, 2**60 + number, flags)


def features_of(settings: Settings, header: Callable[[int], bytes | None]) -> list[FeatureRecord]:
    """Through a worker, each event with the header of its number."""
    ensure_topics(settings)
    config = ModelConfig(conv_channels=(8,), lstm_hidden=16, lstm_layers=1, num_features=8)
    engine = Engine(seeded_artifact(config=config), device="cpu", max_batch=16)
    events = simulate(symbols=symbol_names(1), seed=5, num_events=NUM_EVENTS, start_time_us=10**15)
    with running_worker(settings, engine) as worker:
        with MarketEventProducer(settings) as producer:
            for number, event in enumerate(events):
                value = header(number)
                headers = [] if value is None else [("traceparent", value)]
                producer.produce(event, headers=headers)
        worker.wait_until_ended("realtime", NUM_EVENTS)
        worker.stop()
    return features(settings, NUM_FEATURES)


def trace_header(record: FeatureRecord) -> bytes | None:
    return dict(record.headers).get("traceparent")


@pytest.mark.parametrize("delivery", ["at_least_once", "exactly_once"])
def test_a_sampled_event_s_trace_goes_through_stage_by_stage(
    make_settings: MakeSettings, collector: Collector, delivery: str
) -> None:
    settings = make_settings(
        tracing={"enabled": True, "sample_ratio": 0},
        worker={"delivery": delivery, "instance_id": "traced"},
    )
    received = features_of(settings, lambda number: parent(number, SAMPLED))
    assert collector.services == {"tapeline-worker"}
    by_id = {span.span_id: span for span in collector.spans}
    batches = {span.span_id: span for span in collector.spans if span.name == "micro-batch"}
    processes = [span for span in collector.spans if span.name.startswith("process ")]
    assert len(processes) == len(received) == NUM_FEATURES
    for record in received:
        version, trace, span_id, flags = (trace_header(record) or b"").split(b"-")
        assert (version, flags) == (b"00", SAMPLED)
        process = by_id[bytes.fromhex(span_id.decode())]
        number = int(trace, 16) - 1
        assert process.trace_id == bytes.fromhex(trace.decode())
        assert process.parent_span_id == (2**60 + number).to_bytes(8, "big")
        assert {one.key: one.value for one in process.attributes}[
            "messaging.kafka.offset"
        ].int_value == record.feature.source_offset
        children = [span for span in collector.spans if span.parent_span_id == process.span_id]
        assert sorted(span.name for span in children) == sorted(STAGES)
        children.sort(key=lambda span: (span.start_time_unix_nano, span.end_time_unix_nano))
        assert children[0].start_time_unix_nano == process.start_time_unix_nano
        assert max(span.end_time_unix_nano for span in children) == process.end_time_unix_nano
        for earlier, later in itertools.pairwise(children):
            assert earlier.end_time_unix_nano == later.start_time_unix_nano
        [model] = [span for span in children if span.name == "model"]
        [link] = model.links
        assert process.span_id in {one.span_id for one in batches[link.span_id].links}
    assert sum(len(batch.links) for batch in batches.values()) == NUM_FEATURES


def test_an_unsampled_trace_goes_on_as_it_came(
    make_settings: MakeSettings, collector: Collector
) -> None:
    settings = make_settings(tracing={"enabled": True, "sample_ratio": 1})
    received = features_of(settings, lambda number: parent(number, UNSAMPLED))
    assert {trace_header(one) for one in received} == {
        parent(number, UNSAMPLED) for number in range(NUM_EVENTS - NUM_FEATURES, NUM_EVENTS)
    }
    assert collector.spans == []


def test_events_without_a_trace_are_sampled_and_a_broken_one_begins_anew(
    make_settings: MakeSettings, collector: Collector
) -> None:
    settings = make_settings(tracing={"enabled": True, "sample_ratio": 1})
    received = features_of(settings, lambda number: b"nonsense" if number % 2 else None)
    processes = [span for span in collector.spans if span.name.startswith("process ")]
    assert len(processes) == NUM_FEATURES
    assert not any(span.parent_span_id for span in processes)
    assert len({span.trace_id for span in processes}) == NUM_FEATURES
    assert all(int((trace_header(one) or b"")[-2:], 16) & 1 for one in received)  # sampled


def test_switched_off_nothing_is_made_and_headers_pass(
    make_settings: MakeSettings, collector: Collector
) -> None:
    received = features_of(make_settings(), lambda number: parent(number, SAMPLED))
    assert {trace_header(one) for one in received} == {
        parent(number, SAMPLED) for number in range(NUM_EVENTS - NUM_FEATURES, NUM_EVENTS)
    }
    assert collector.spans == []
