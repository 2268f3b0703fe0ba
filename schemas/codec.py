"""Avro bytes of the three messages, with a Schema Registry or without.

With a registry: Confluent's wire format (a zero byte, the schema's id, Avro); subject = record
name.
Without: Avro's single-object encoding (two marker bytes, the schema's 64-bit fingerprint, Avro);
fingerprints of older versions are resolved from ``schemas/released/``. Bare Avro is read, too, if
the fingerprint comes in the header ``avro-fingerprint``.
"""

import io
import json
import struct
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from typing import Any, Literal, Protocol

import fastavro
import numpy as np
from confluent_kafka.schema_registry import Schema, SchemaRegistryClient
from confluent_kafka.schema_registry.error import SchemaRegistryError

from schemas.errors import ConfigError, PoisonRecord, TransientError
from schemas.messages import (
    Bar,
    Book,
    DeadLetter,
    FeatureVector,
    Flags,
    Headers,
    InvalidEvent,
    MarketEvent,
    Quote,
    Sample,
    Trade,
    check_event,
)
from schemas.settings import SchemaRegistrySettings

FINGERPRINT_HEADER = "avro-fingerprint"
MessageName = Literal["market_event", "feature_vector", "dead_letter"]
AvroSchema = dict[str, Any]

_SINGLE_OBJECT = b"\xc3\x01"
_FINGERPRINT_BYTES = 8
_REGISTRY_PREFIX = struct.Struct(">bI")  # magic byte 0, schema id
_NOT_FOUND = 404


def schema_text(name: MessageName) -> str:
    """The current schema of a message, as JSON text."""
    return (files("schemas") / f"{name}.avsc").read_text()


@cache
def released_schemas(name: MessageName) -> tuple[AvroSchema, ...]:
    """Every version of a message's schema that was ever released, oldest first."""
    folder = files("schemas") / "released"
    found = sorted(
        (int(path.name.removesuffix(".avsc").rpartition(".v")[2]), path.read_text())
        for path in folder.iterdir()
        if path.name.startswith(f"{name}.v")
    )
    return tuple(json.loads(text) for _, text in found)


def fingerprint(schema: AvroSchema) -> bytes:
    """The CRC-64-AVRO fingerprint of a schema's parsing canonical form, as 16 hex digits."""
    canonical = fastavro.schema.to_parsing_canonical_form(schema)
    return fastavro.schema.fingerprint(canonical, "CRC-64-AVRO").encode()


class Wire(Protocol):
    """How a message's bytes say which schema wrote them. ``schema`` is the current one, parsed."""

    schema: AvroSchema

    prefix: bytes
    """What precedes the Avro bytes of the current schema."""

    def untag(self, value: bytes, headers: Headers) -> tuple[AvroSchema, int]:
        """Gives the writer's parsed schema and where the Avro bytes begin."""


class FingerprintWire:
    """The fingerprint travels in front of the Avro bytes; or, with bare ones, in a header.

    Bare Avro of ours is never taken for the other: it would begin with a name of -98 characters.
    """

    def __init__(self, name: MessageName) -> None:
        current = json.loads(schema_text(name))
        self.schema = _parse(current)
        self._schemas = {fingerprint(one): _parse(one) for one in released_schemas(name)}
        self._schemas[fingerprint(current)] = self.schema
        self.prefix = _SINGLE_OBJECT + bytes.fromhex(fingerprint(current).decode())

    def untag(self, value: bytes, headers: Headers) -> tuple[AvroSchema, int]:
        start = len(_SINGLE_OBJECT) + _FINGERPRINT_BYTES
        if value.startswith(_SINGLE_OBJECT) and len(value) >= start:
            found = value[len(_SINGLE_OBJECT) : start].hex().encode()
            if schema := self._schemas.get(found):
                return schema, start
            raise PoisonRecord("decode", "unknown_schema", f"unknown fingerprint {found!r}")
        for name, tag in headers:
            if name == FINGERPRINT_HEADER:
                if schema := self._schemas.get(tag or b""):
                    return schema, 0
                raise PoisonRecord("decode", "unknown_schema", f"unknown fingerprint {tag!r:.60}")
        raise PoisonRecord(
            "decode",
            "unknown_schema",
            f"neither Avro's single-object encoding nor a header {FINGERPRINT_HEADER!r}",
        )


class RegistryWire:
    """Confluent wire format; schemas are registered and resolved by id.

    Registering needs the registry once, at construction, which blocks and raises ConfigError.
    """

    def __init__(self, name: MessageName, client: SchemaRegistryClient) -> None:
        text = schema_text(name)
        subject = f"tapeline.{json.loads(text)['name']}"
        self._client = client
        try:
            schema_id = client.register_schema(subject, Schema(text, "AVRO"))
        except Exception as error:  # the client lets its HTTP library's own errors through
            raise ConfigError(
                f"cannot register {subject} with the Schema Registry: {error}; "
                "check schema_registry.url, or unset it to do without a registry"
            ) from error
        self.prefix = _REGISTRY_PREFIX.pack(0, schema_id)
        self.schema = _parse(json.loads(text))
        self._schemas = {schema_id: self.schema}

    def untag(self, value: bytes, headers: Headers) -> tuple[AvroSchema, int]:
        if len(value) < _REGISTRY_PREFIX.size or value[0] != 0:
            raise PoisonRecord("decode", "unknown_schema", "not in Confluent's wire format")
        _, schema_id = _REGISTRY_PREFIX.unpack_from(value)
        if schema_id not in self._schemas:
            self._schemas[schema_id] = self._fetch(schema_id)
        return self._schemas[schema_id], _REGISTRY_PREFIX.size

    def _fetch(self, schema_id: int) -> AvroSchema:
        try:
            text = self._client.get_schema(schema_id).schema_str
        except SchemaRegistryError as error:
            if error.http_status_code == _NOT_FOUND:
                raise PoisonRecord(
                    "decode", "unknown_schema", f"the Schema Registry knows no id {schema_id}"
                ) from error
            raise TransientError(f"the Schema Registry answered {error}") from error
        except Exception as error:  # the client lets its HTTP library's own errors through
            raise TransientError(f"the Schema Registry does not answer: {error}") from error
        try:
            return _parse(json.loads(text or "null"))
        except Exception as error:  # a JSON or Protobuf schema: not ours, and not to be read
            raise PoisonRecord(
                "decode",
                "unknown_schema",
                f"schema id {schema_id} is no Avro schema: {error!r:.200}",
            ) from error


class Codec:
    """The three messages to Avro bytes and headers, and back.

    Decoding raises PoisonRecord for what no one can ever read, TransientError while the registry
    does not answer. Safe to share between threads.

    Args:
        client: the registry's client; by default one is made when ``settings.url`` is given.
    """

    def __init__(
        self, settings: SchemaRegistrySettings, client: SchemaRegistryClient | None = None
    ) -> None:
        if client is None and settings.url:
            client = SchemaRegistryClient.new_client({"url": settings.url, **settings.client})
        self._client = client
        self._wires: dict[MessageName, Wire] = {}

    def encode_event(self, event: MarketEvent) -> bytes:
        """The value of one event. Raises InvalidEvent if it breaks the contract."""
        check_event(event)
        payload = event.payload
        return self._encode(
            "market_event",
            {
                "event_id": event.event_id,
                "symbol": event.symbol,
                "venue": event.venue,
                "event_time_us": event.event_time_us,
                "sequence": event.sequence,
                "payload": (
                    f"tapeline.{type(payload).__name__}",
                    {name: getattr(payload, name) for name in payload.__struct_fields__},
                ),
            },
        )

    def decode_event(self, value: bytes | None, headers: Headers = ()) -> MarketEvent:
        record = self._decode("market_event", value, headers)
        name, fields = record["payload"]
        event = MarketEvent(
            record["event_id"],
            record["symbol"],
            record["venue"],
            record["event_time_us"],
            _PAYLOADS[name](**fields),
            record["sequence"],
        )
        try:
            check_event(event)
        except InvalidEvent as error:
            raise PoisonRecord("decode", error.reason, str(error)) from error
        return event

    @property
    def event_prefix(self) -> bytes:
        """What the value of an event in the current schema begins with."""
        return self._wire("market_event").prefix

    @property
    def feature_prefix(self) -> bytes:
        """The same of a feature."""
        return self._wire("feature_vector").prefix

    def encode_feature(self, feature: FeatureVector) -> bytes:
        """The value of one feature vector."""
        return self._encode(
            "feature_vector",
            {
                "event_id": feature.event_id,
                "symbol": feature.symbol,
                "venue": feature.venue,
                "event_time_us": feature.event_time_us,
                "lane": feature.lane,
                "model_version": feature.model_version,
                "channels_version": feature.channels_version,
                "source_topic": feature.source_topic,
                "source_partition": feature.source_partition,
                "source_offset": feature.source_offset,
                "features": feature.features.astype("<f4", copy=False).tobytes(),
                "scores": feature.scores,
                "flags": int(feature.flags),
                "source_appended_us": feature.source_appended_us,
            },
        )

    def decode_feature(self, value: bytes | None, headers: Headers = ()) -> FeatureVector:
        record = self._decode("feature_vector", value, headers)
        if len(record["features"]) % 4:
            raise PoisonRecord("decode", "bad_avro", "features must be little-endian float32")
        record["features"] = np.frombuffer(record["features"], "<f4")
        record["flags"] = Flags(record["flags"])
        return FeatureVector(**record)

    def encode_dead_letter(self, letter: DeadLetter) -> bytes:
        """The value of one dead letter."""
        record = asdict(letter)
        record["headers"] = [{"name": name, "value": value} for name, value in letter.headers]
        return self._encode("dead_letter", record)

    def decode_dead_letter(self, value: bytes | None, headers: Headers = ()) -> DeadLetter:
        record = self._decode("dead_letter", value, headers)
        record["headers"] = [(one["name"], one["value"]) for one in record["headers"]]
        return DeadLetter(**record)

    def _encode(self, name: MessageName, record: AvroSchema) -> bytes:
        wire = self._wire(name)
        out = io.BytesIO()
        out.write(wire.prefix)
        fastavro.schemaless_writer(out, wire.schema, record)
        return out.getvalue()

    def _decode(self, name: MessageName, value: bytes | None, headers: Headers) -> AvroSchema:
        if value is None:
            raise PoisonRecord("decode", "no_value", "the record has no value (a tombstone)")
        wire = self._wire(name)
        writer_schema, start = wire.untag(value, headers)
        source = io.BytesIO(value)
        source.seek(start)
        try:
            record: Any = fastavro.schemaless_reader(
                source,
                writer_schema,
                None if writer_schema is wire.schema else wire.schema,
                return_record_name=True,
            )
        except Exception as error:  # foreign bytes: fastavro raises what its parsing runs into
            # Cut short: an error of Unicode quotes all of its bytes, at four characters each.
            raise PoisonRecord("decode", "bad_avro", f"not valid Avro: {error!r:.200}") from error
        if (rest := len(value) - source.tell()) > 0:
            raise PoisonRecord("decode", "bad_avro", f"{rest} bytes follow the Avro record")
        return dict(record)

    def _wire(self, name: MessageName) -> Wire:
        if name not in self._wires:
            client = self._client
            self._wires[name] = RegistryWire(name, client) if client else FingerprintWire(name)
        return self._wires[name]


def _parse(schema: AvroSchema) -> AvroSchema:
    parsed: AvroSchema = fastavro.parse_schema(schema)  # type: ignore[assignment]
    return parsed


_PAYLOADS: dict[str, Callable[..., Trade | Quote | Book | Bar | Sample]] = {
    f"tapeline.{payload.__name__}": payload for payload in (Trade, Quote, Book, Bar, Sample)
}
