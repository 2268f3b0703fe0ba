"""The wire, both of them: bare Avro with a fingerprint, and Confluent's format with a registry.

One suite for both. Whatever bytes arrive, decoding gives a message or PoisonRecord, never another
error: anything else would end the worker, which would then stumble over the same record again.
"""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import FINGERPRINT_HEADER, Codec, fingerprint, schema_text
from schemas.errors import ConfigError, PoisonRecord, TransientError
from schemas.messages import (
    MAX_LONG,
    MAX_PRICE,
    MAX_SIZE,
    MIN_PRICE,
    Bar,
    Book,
    DeadLetter,
    FeatureVector,
    Flags,
    Headers,
    InvalidEvent,
    MarketEvent,
    Payload,
    Quote,
    Sample,
    Trade,
)
from schemas.settings import SchemaRegistrySettings
from tapeline.processes import free_ports

Message = MarketEvent | FeatureVector | DeadLetter


@pytest.fixture(scope="module")
def registry() -> SchemaRegistryClient:
    """confluent-kafka's own registry in memory."""
    return SchemaRegistryClient.new_client({"url": "mock://tapeline"})


@pytest.fixture(scope="module", params=["fingerprint", "registry"])
def codec(request: pytest.FixtureRequest, registry: SchemaRegistryClient) -> Codec:
    by_registry = request.param == "registry"
    return Codec(SchemaRegistrySettings(), registry if by_registry else None)


# Messages.

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=128)
PRICES = st.floats(MIN_PRICE, MAX_PRICE)
SIZES = st.floats(0, MAX_SIZE)
LONGS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(width=32)


@st.composite
def sides(draw: st.DrawFn, *, rising: bool) -> list[tuple[float, float]]:
    prices = draw(st.lists(PRICES, max_size=10, unique=True))
    return [(price, draw(SIZES)) for price in sorted(prices, reverse=not rising)]


PAYLOADS: dict[str, st.SearchStrategy[Payload]] = {
    "trade": st.builds(Trade, PRICES, SIZES, st.sampled_from(["unknown", "buy", "sell"])),
    "quote": st.builds(Quote, PRICES, SIZES, PRICES, SIZES),
    "book": st.builds(Book.from_levels, sides(rising=False), sides(rising=True)),
    "bar": st.builds(Bar, PRICES, PRICES, PRICES, PRICES, SIZES, st.integers(1, MAX_LONG)),
    "sample": st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60
    ).map(Sample.from_values),
}


def events(payloads: st.SearchStrategy[Payload]) -> st.SearchStrategy[MarketEvent]:
    sequences = st.none() | st.integers(0, MAX_LONG)
    return st.builds(
        MarketEvent, NAMES, NAMES, NAMES, st.integers(1, MAX_LONG), payloads, sequences
    )


FEATURES = st.builds(
    FeatureVector,
    event_time_us=LONGS,
    source_partition=st.integers(0, 2**31 - 1),
    source_offset=LONGS,
    features=st.lists(FLOATS, max_size=130).map(lambda some: np.array(some, np.float32)),
    scores=st.dictionaries(NAMES, FLOATS, max_size=3),
    flags=st.integers(0, 31).map(Flags),
    **dict.fromkeys(
        ("event_id", "symbol", "venue", "lane", "model_version", "channels_version"), NAMES
    ),
    source_topic=NAMES,
)
OPTIONAL_BYTES = st.none() | st.binary(max_size=50)
LETTERS = st.builds(
    DeadLetter,
    key=OPTIONAL_BYTES,
    value=OPTIONAL_BYTES,
    headers=st.lists(st.tuples(NAMES, OPTIONAL_BYTES), max_size=3),
    source_partition=st.integers(0, 2**31 - 1),
    source_offset=LONGS,
    attempts=st.integers(0, 2**31 - 1),
    failed_at_us=LONGS,
    model_version=st.none() | NAMES,
    **dict.fromkeys(("source_topic", "lane", "stage", "reason", "error_class", "message"), NAMES),
)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    events(st.one_of(*PAYLOADS.values())), FEATURES, LETTERS
)

TRADE = MarketEvent("id", "BTCUSDT", "V", 1_700_000_000_000_000, Trade(60_000.5, 0.25, "sell"), 7)
FEATURE = FeatureVector(
    "id", "BTCUSDT", "V", 1, "realtime", "m-1", "market50-v1", "t", 0, 12,
    np.arange(4, dtype=np.float32), {"up": 0.5}, Flags.GAP | Flags.STALE,
)  # fmt: skip
LETTER = DeadLetter(
    b"key", b"\0\1", [("name", b"x"), ("null", None)], "t", 0, 12, "realtime", "decode", "bad_avro",
    "PoisonRecord", "not valid Avro", 1, 1_700_000_000_000_000, "m-1",
)  # fmt: skip
EXAMPLES: list[Message] = [
    TRADE,
    MarketEvent("id", "ÄÖÜ", "V", 1, Quote(1.0, 2.0, 3.0, 4.0)),
    MarketEvent("id", "S", "V", 1, Book.from_levels([(2, 1), (1, 1)], [(3, 1)])),
    MarketEvent("id", "S", "V", 1, Bar(1.0, 2.0, 0.5, 1.5, 9.0, 60_000_000)),
    MarketEvent("id", "S", "V", 1, Sample.from_values([1, 2, 3])),
    FEATURE,
    LETTER,
]


# The suite.


@pytest.mark.parametrize("kind", PAYLOADS)
@given(data=st.data())
def test_events_make_the_round_trip(codec: Codec, kind: str, data: st.DataObject) -> None:
    event = data.draw(events(PAYLOADS[kind]))
    assert codec.decode_event(codec.encode_event(event)) == event


@given(feature=FEATURES)
def test_feature_vectors_make_the_round_trip(codec: Codec, feature: FeatureVector) -> None:
    assert_same_feature(codec.decode_feature(codec.encode_feature(feature)), feature)


@given(letter=LETTERS)
def test_dead_letters_make_the_round_trip(codec: Codec, letter: DeadLetter) -> None:
    assert codec.decode_dead_letter(codec.encode_dead_letter(letter)) == letter


def test_decoded_features_are_float32_in_native_order(codec: Codec) -> None:
    value = codec.encode_feature(FEATURE)
    features = codec.decode_feature(value).features
    assert features.dtype == np.float32
    assert not features.flags.writeable


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: type(one).__name__)
def test_truncation_at_every_byte_is_poison(codec: Codec, example: Message) -> None:
    value = encode(codec, example)
    for end in range(len(value)):
        with pytest.raises(PoisonRecord) as poison:
            decode(codec, example, value[:end])
        assert poison.value.stage == "decode"
        assert poison.value.reason in ("bad_avro", "unknown_schema")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("behind", [b"\0", b"more"])
def test_bytes_behind_the_record_are_poison(codec: Codec, example: Message, behind: bytes) -> None:
    value = encode(codec, example)
    with pytest.raises(PoisonRecord, match=f"{len(behind)} bytes follow") as poison:
        decode(codec, example, value + behind)
    assert poison.value.reason == "bad_avro"


@given(message=st.sampled_from(EXAMPLES), noise=st.binary(max_size=300))
def test_random_bytes_are_poison_or_a_message(codec: Codec, message: Message, noise: bytes) -> None:
    """Behind a valid prefix, too, so that the registry's format is not refused at the door."""
    decoded_or_poison(codec, message, noise)
    decoded_or_poison(codec, message, prefix(codec, message) + noise)


@given(data=st.data())
def test_mutated_records_are_poison_or_a_message(codec: Codec, data: st.DataObject) -> None:
    """A few bytes changed, cut out or put in: what gets through still keeps the contract."""
    message = data.draw(st.one_of(st.sampled_from(EXAMPLES), MESSAGES))
    encoded = encode(codec, message)
    value = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(len(prefix(codec, message)), len(value)))
        length = data.draw(st.integers(0, 3))
        value[start : start + length] = data.draw(st.binary(max_size=4))
    decoded_or_poison(codec, message, bytes(value))


def test_event_that_breaks_the_contract_is_refused_on_both_ends(codec: Codec) -> None:
    bad = MarketEvent("id", "S", "V", 1, Trade(1.0, -2.0))
    with pytest.raises(InvalidEvent) as refused:
        codec.encode_event(bad)
    assert refused.value.reason == "negative_size"
    good = codec.encode_event(MarketEvent("id", "S", "V", 1, Trade(1.0, 2.0)))
    spoiled = good.replace(np.float64(2.0).tobytes(), np.float64(-2.0).tobytes())
    with pytest.raises(PoisonRecord, match="size must not be negative") as poison:
        codec.decode_event(spoiled)
    assert (poison.value.stage, poison.value.reason) == ("decode", "negative_size")


def test_half_a_float_is_poison(codec: Codec) -> None:
    """Avro has no word for the length of ``features``; the codec must look."""
    value = codec.encode_feature(FEATURE)
    floats = FEATURE.features.tobytes()
    cut = value.replace(b"\x20" + floats, b"\x1e" + floats[:-1])  # lengths are zigzag: 16, 15
    assert len(cut) == len(value) - 1
    with pytest.raises(PoisonRecord, match="float32"):
        codec.decode_feature(cut)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda one: type(one).__name__)
def test_tombstone_is_poison(codec: Codec, example: Message) -> None:
    with pytest.raises(PoisonRecord) as poison:
        decode(codec, example, None)
    assert poison.value.reason == "no_value"


# What only one of them has.


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("other", b"x")],
        [(FINGERPRINT_HEADER, None)],
        [(FINGERPRINT_HEADER, b"")],
        [(FINGERPRINT_HEADER, b"0123456789abcdef")],
        [(FINGERPRINT_HEADER, b"\xff\0")],
    ],
)
def test_unknown_fingerprint_is_poison(headers: Headers) -> None:
    codec = Codec(SchemaRegistrySettings())
    value = codec.encode_event(TRADE)
    with pytest.raises(PoisonRecord) as poison:
        codec.decode_event(value[10:], headers)
    assert poison.value.reason == "unknown_schema"


def test_tag_is_avro_s_single_object_encoding() -> None:
    """Two marker bytes, then the schema's fingerprint; headers have no say."""
    codec = Codec(SchemaRegistrySettings())
    value = codec.encode_event(TRADE)
    tag = fingerprint(json.loads(schema_text("market_event")))
    assert value[:10] == b"\xc3\x01" + bytes.fromhex(tag.decode())
    assert codec.decode_event(value, [(FINGERPRINT_HEADER, b"0123456789abcdef")]) == TRADE
    with pytest.raises(PoisonRecord, match="unknown fingerprint") as poison:
        codec.decode_event(b"\xc3\x01" + bytes(8) + value[10:])
    assert poison.value.reason == "unknown_schema"


def test_fingerprint_of_bare_avro_is_found_among_other_headers() -> None:
    codec = Codec(SchemaRegistrySettings())
    tag = (FINGERPRINT_HEADER, fingerprint(json.loads(schema_text("market_event"))))
    around = [("traceparent", b"00-1"), tag, ("late", None)]
    assert codec.decode_event(codec.encode_event(TRADE)[10:], around) == TRADE


def test_fingerprint_is_no_other_message_s() -> None:
    """A feature on an event topic is refused by its tag, not read as something else."""
    codec = Codec(SchemaRegistrySettings())
    with pytest.raises(PoisonRecord) as poison:
        codec.decode_event(codec.encode_feature(FEATURE))
    assert poison.value.reason == "unknown_schema"


def test_registry_s_wire_format_is_confluent_s(registry: SchemaRegistryClient) -> None:
    """A zero byte, the id as four bytes, big-endian; subject by record name; no header."""
    value = Codec(SchemaRegistrySettings(), registry).encode_event(TRADE)
    schema = Schema(schema_text("market_event"), "AVRO")
    registered = registry.lookup_schema("tapeline.MarketEvent", schema)
    assert registered.schema_id is not None
    assert value[:5] == b"\0" + registered.schema_id.to_bytes(4, "big")
    assert value[5:] == Codec(SchemaRegistrySettings()).encode_event(TRADE)[10:]


def test_mock_url_makes_a_client() -> None:
    codec = Codec(SchemaRegistrySettings(url="mock://of-settings"))
    assert codec.decode_event(codec.encode_event(TRADE)) == TRADE


def test_unknown_schema_id_is_poison(registry: SchemaRegistryClient) -> None:
    codec = Codec(SchemaRegistrySettings(), registry)
    value = codec.encode_event(TRADE)
    for tag in (b"\0\0\0\x7f\xff", b"\0\xff\xff\xff\xff", b"\1" + value[1:5]):
        with pytest.raises(PoisonRecord) as poison:
            codec.decode_event(tag + value[5:], ())
        assert poison.value.reason == "unknown_schema"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ('{"type": "object"}', "JSON"),
        ('syntax = "proto3"; message M {}', "PROTOBUF"),
        ('{"type": "record", "name": "X", "fields": [{"name": "a", "type": "nosuch"}]}', "AVRO"),
        ('{"type": "record", "name": "Y", "fields": []}', "AVRO"),
        ('"string"', "AVRO"),
    ],
)
def test_somebody_else_s_schema_is_poison(
    registry: SchemaRegistryClient, text: str, kind: str
) -> None:
    """A registry has schemas of others, and not only Avro ones; their records are not ours."""
    codec = Codec(SchemaRegistrySettings(), registry)
    schema_id = registry.register_schema(f"foreign-{text}", Schema(text, kind))
    value = codec.encode_event(TRADE)
    with pytest.raises(PoisonRecord) as poison:
        codec.decode_event(b"\0" + schema_id.to_bytes(4, "big") + value[5:], ())
    assert poison.value.reason in ("unknown_schema", "bad_avro")


def test_registry_that_cannot_be_reached_is_a_config_error() -> None:
    (port,) = free_ports(1)
    settings = SchemaRegistrySettings(
        url=f"http://127.0.0.1:{port}", client={"max.retries": 0, "timeout": 2}
    )
    with pytest.raises(ConfigError, match=r"check schema_registry\.url, or unset it"):
        Codec(settings).encode_event(TRADE)


class _OneSchemaRegistry(BaseHTTPRequestHandler):
    """Takes any schema as number 1, and has trouble with every question."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {"id": 1})

    def do_GET(self) -> None:
        self._answer(500, {"error_code": 50001, "message": "the store is not there"})

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def ailing_registry() -> Iterator[tuple[Codec, Callable[[], None]]]:
    """A codec of a registry over HTTP that registers and then fails, and what ends that one."""
    server = HTTPServer(("127.0.0.1", 0), _OneSchemaRegistry)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    settings = SchemaRegistrySettings(url=url, client={"max.retries": 0, "timeout": 2})

    def end() -> None:
        server.shutdown()
        thread.join()
        server.server_close()

    try:
        yield Codec(settings), end
    finally:
        end()


def test_registry_that_fails_later_is_transient(
    ailing_registry: tuple[Codec, Callable[[], None]],
) -> None:
    """Neither an answer of 500 nor a closed door says that the record is bad: try again."""
    codec, end_registry = ailing_registry
    value = codec.encode_event(TRADE)
    unknown = b"\0\0\0\0\2" + value[5:]
    with pytest.raises(TransientError, match="the Schema Registry answered"):
        codec.decode_event(unknown, ())
    end_registry()
    with pytest.raises(TransientError, match="the Schema Registry does not answer"):
        codec.decode_event(unknown, ())
    assert codec.decode_event(value, ()) == TRADE, "the schemas it knows need no registry"


def encode(codec: Codec, message: Message) -> bytes:
    match message:
        case MarketEvent():
            return codec.encode_event(message)
        case FeatureVector():
            return codec.encode_feature(message)
        case DeadLetter():
            return codec.encode_dead_letter(message)


def decode(codec: Codec, like: Message, value: bytes | None) -> Message:
    match like:
        case MarketEvent():
            return codec.decode_event(value)
        case FeatureVector():
            return codec.decode_feature(value)
        case DeadLetter():
            return codec.decode_dead_letter(value)


def prefix(codec: Codec, message: Message) -> bytes:
    """What comes before the Avro bytes."""
    value = encode(codec, message)
    return value[: 5 if value[0] == 0 else 10]


def decoded_or_poison(codec: Codec, like: Message, value: bytes) -> None:
    try:
        message = decode(codec, like, value)
    except PoisonRecord:
        return
    if isinstance(message, MarketEvent):
        encode(codec, message)  # what gets through keeps the contract


def assert_same_feature(actual: FeatureVector, expected: FeatureVector) -> None:
    for field in fields(FeatureVector):
        one, other = getattr(actual, field.name), getattr(expected, field.name)
        if field.name == "features":
            assert one.tobytes() == other.tobytes(), "the same bits, NaNs included"
        elif field.name == "scores":
            np.testing.assert_equal(dict(one), dict(other))
        else:
            assert one == other, field.name
