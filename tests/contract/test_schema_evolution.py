"""Schemas only evolve compatibly: today's reads what any release wrote, and any release today's."""

import copy
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import fastavro
import pytest
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from fastavro.utils import generate_many

import schemas.codec
from schemas.codec import (
    FINGERPRINT_HEADER,
    AvroSchema,
    Codec,
    MessageName,
    fingerprint,
    released_schemas,
    schema_text,
)
from schemas.messages import FeatureVector, Flags, MarketEvent, Trade
from schemas.settings import SchemaRegistrySettings

RELEASED = Path(schemas.codec.__file__).parent / "released"
MESSAGE_NAMES: tuple[MessageName, ...] = get_args(MessageName)

# File to the fingerprint on the wire and the start of its SHA-256. A release adds lines; a line
# that changes means that records of that release can no longer be told or read.
HISTORY = {
    "dead_letter.v1.avsc": ("b43e12e54308ea13", "3ea9336ab5652773"),
    "feature_vector.v1.avsc": ("1e0d4676ddb2ec63", "d17dc19ee6a5c4a0"),
    "feature_vector.v2.avsc": ("307ae45bc520042b", "e95dd6f92378512a"),
    "market_event.v1.avsc": ("8145035e693dcc65", "4b792908e2a33ee2"),
}


def current(name: MessageName) -> AvroSchema:
    schema: AvroSchema = json.loads(schema_text(name))
    return schema


# History.


def test_history_is_as_it_was_released() -> None:
    found = {}
    for path in RELEASED.iterdir():
        schema = json.loads(path.read_text())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.name] = (fingerprint(schema).decode(), digest[:16])
    assert found == HISTORY, "a released schema never changes; put the next version beside it"


@pytest.mark.parametrize("name", MESSAGE_NAMES)
def test_releases_are_numbered_from_one(name: MessageName) -> None:
    """Oldest first, none missing, all of them known to the codec."""
    versions = sorted(int(path.stem.rpartition(".v")[2]) for path in RELEASED.glob(f"{name}.v*"))
    assert versions == list(range(1, len(versions) + 1))
    texts = [(RELEASED / f"{name}.v{version}.avsc").read_text() for version in versions]
    assert list(released_schemas(name)) == [json.loads(text) for text in texts]
    assert texts, "the first release is version 1"


@pytest.mark.parametrize("name", MESSAGE_NAMES)
def test_current_schema_and_every_release_read_each_other(name: MessageName) -> None:
    """Old records in the topics, and subscribers that are not updated yet."""
    for released in released_schemas(name):
        assert is_read_by(current(name), writer=released), "backward"
        assert is_read_by(released, writer=current(name)), "forward"


# What the check above would say to changes; else it might be blind.

Change = Callable[[AvroSchema], None]


def add_field(**field: Any) -> Change:
    return lambda schema: schema["fields"].append(field)


def drop_field(name: str) -> Change:
    def change(schema: AvroSchema) -> None:
        schema["fields"] = [field for field in schema["fields"] if field["name"] != name]

    return change


def retype(name: str, to: Any) -> Change:
    def change(schema: AvroSchema) -> None:
        next(field for field in schema["fields"] if field["name"] == name)["type"] = to

    return change


def drop_payload(schema: AvroSchema) -> None:
    next(field for field in schema["fields"] if field["name"] == "payload")["type"].pop()


def drop_side(schema: AvroSchema) -> None:
    payloads = next(field for field in schema["fields"] if field["name"] == "payload")["type"]
    payloads[0]["fields"][2]["type"]["symbols"].pop()


def rename_bar_s_field(schema: AvroSchema) -> None:
    payloads = next(field for field in schema["fields"] if field["name"] == "payload")["type"]
    payloads[3]["fields"][0]["name"] = "opening"


@pytest.mark.parametrize(
    ("change", "is_backward", "is_forward"),
    [
        (add_field(name="more", type=["null", "string"], default=None), True, True),
        (add_field(name="more", type="int", default=5), True, True),
        (add_field(name="more", type="string"), False, True),
        (drop_field("sequence"), True, True),
        (drop_field("venue"), True, False),
        (retype("venue", ["null", "string"]), True, False),
        (retype("venue", "long"), False, False),
        (retype("event_time_us", "double"), False, False),  # a double rounds microseconds
        (drop_payload, False, True),
        (drop_side, False, True),
        (rename_bar_s_field, False, False),
    ],
)
def test_changes_are_told_apart(change: Change, is_backward: bool, is_forward: bool) -> None:
    old = current("market_event")
    new = copy.deepcopy(old)
    change(new)
    assert is_read_by(new, writer=old) == is_backward
    assert is_read_by(old, writer=new) == is_forward


# The codec.


@pytest.fixture
def release(monkeypatch: pytest.MonkeyPatch) -> Callable[[MessageName, AvroSchema], None]:
    """Makes a schema one that was released before the first."""
    known = {name: released_schemas(name) for name in MESSAGE_NAMES}

    def add(name: MessageName, schema: AvroSchema) -> None:
        known[name] = (schema, *known[name])
        monkeypatch.setattr(schemas.codec, "released_schemas", known.__getitem__)

    return add


EVENT = MarketEvent("id", "S", "V", 1, Trade(2.0, 3.0, "buy"), sequence=None)
EVENT_FIELDS = {
    "event_id": "id",
    "symbol": "S",
    "venue": "V",
    "event_time_us": 1,
    "payload": ("tapeline.Trade", {"price": 2.0, "size": 3.0, "side": "buy"}),
}


def older_event_schema() -> AvroSchema:
    """One without a sequence."""
    schema = current("market_event")
    drop_field("sequence")(schema)
    return schema


def test_older_fingerprint_is_resolved(
    release: Callable[[MessageName, AvroSchema], None],
) -> None:
    older = older_event_schema()
    assert fingerprint(older) != fingerprint(current("market_event"))
    value, headers = written(older, EVENT_FIELDS), [(FINGERPRINT_HEADER, fingerprint(older))]
    with pytest.raises(Exception, match="unknown fingerprint"):
        Codec(SchemaRegistrySettings()).decode_event(value, headers)
    release("market_event", older)
    codec = Codec(SchemaRegistrySettings())
    assert codec.decode_event(value, headers) == EVENT
    assert codec.decode_event(codec.encode_event(EVENT)) == EVENT, "it still writes the current"


def test_older_trade_has_no_side(release: Callable[[MessageName, AvroSchema], None]) -> None:
    """A default inside a payload."""
    older = current("market_event")
    trade = next(field for field in older["fields"] if field["name"] == "payload")["type"][0]
    drop_field("side")(trade)
    release("market_event", older)
    fields = {**EVENT_FIELDS, "sequence": 4}
    fields["payload"] = ("tapeline.Trade", {"price": 2.0, "size": 3.0})
    headers = [(FINGERPRINT_HEADER, fingerprint(older))]
    event = Codec(SchemaRegistrySettings()).decode_event(written(older, fields), headers)
    assert event == MarketEvent("id", "S", "V", 1, Trade(2.0, 3.0, "unknown"), sequence=4)


def test_older_feature_vector_has_defaults(
    release: Callable[[MessageName, AvroSchema], None],
) -> None:
    older = current("feature_vector")
    drop_field("scores")(older)
    drop_field("flags")(older)
    release("feature_vector", older)
    fields = {field["name"]: "x" for field in older["fields"] if field["type"] == "string"}
    numbers = {"event_time_us": 1, "source_partition": 0, "source_offset": 5}
    value = written(older, fields | numbers | {"features": b"\0\0\x80\x3f"})
    headers = [(FINGERPRINT_HEADER, fingerprint(older))]
    feature = Codec(SchemaRegistrySettings()).decode_feature(value, headers)
    assert isinstance(feature, FeatureVector)
    assert (feature.features.tolist(), feature.scores, feature.flags) == ([1.0], {}, Flags(0))


@pytest.mark.parametrize(
    "change",
    [drop_field("sequence"), add_field(name="more", type="int", default=5)],
    ids=["older", "newer"],
)
def test_registry_s_other_versions_are_resolved_by_id(change: Change) -> None:
    """Of a release that this program knows nothing of, even: the registry has its schema."""
    registry = SchemaRegistryClient.new_client({"url": "mock://versions"})
    other = current("market_event")
    change(other)
    schema_id = registry.register_schema("tapeline.MarketEvent", Schema(json.dumps(other), "AVRO"))
    tag = b"\0" + schema_id.to_bytes(4, "big")
    fields = {**EVENT_FIELDS, "sequence": None, "more": 6}
    known = {field["name"]: fields[field["name"]] for field in other["fields"]}
    codec = Codec(SchemaRegistrySettings(), registry)
    assert codec.decode_event(tag + written(other, known), ()) == EVENT
    assert codec.encode_event(EVENT)[:5] != tag


def is_read_by(reader: AvroSchema, *, writer: AvroSchema) -> bool:
    """Whether many random records of the writer's are read, and say what was written.

    Many: the rarest change is seen in one record of twelve.
    """
    parsed_writer, parsed_reader = fastavro.parse_schema(writer), fastavro.parse_schema(reader)
    for record in generate_many(writer, 500):
        value = written(writer, record)
        said = fastavro.schemaless_reader(io.BytesIO(value), parsed_writer, None)
        try:
            read = fastavro.schemaless_reader(io.BytesIO(value), parsed_writer, parsed_reader)
        except Exception:  # fastavro has several; each means no
            return False
        if not is_same(said, read):
            return False  # by Avro's rules an unknown enum symbol becomes its default: a lie
    return True


def is_same(said: Any, read: Any) -> bool:
    """Equal in all that both have; NaN equals itself."""
    if isinstance(said, dict) and isinstance(read, dict):
        return all(is_same(said[key], read[key]) for key in said.keys() & read.keys())
    if isinstance(said, list) and isinstance(read, list):
        return len(said) == len(read) and all(map(is_same, said, read))
    return bool(said == read) or (said != said and read != read)


def written(schema: AvroSchema, record: Any) -> bytes:
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(schema), record)
    return out.getvalue()
