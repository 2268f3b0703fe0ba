"""Whatever lies on a lane is an event or poison, and an event is harmless from there on."""

import struct
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pytest
from columns import columns_of
from fuzzing import (
    CAPTURES,
    FINGERPRINT,
    RawRecord,
    encoded,
    fields_of,
    fuzzed,
    real_events,
    varint,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from consumers.channels import Market50
from consumers.windows import WindowStore
from schemas.codec import FINGERPRINT_HEADER, Codec
from schemas.errors import PoisonRecord
from schemas.messages import (
    Bar,
    Book,
    DeadLetter,
    FeatureVector,
    Headers,
    MarketEvent,
    Quote,
    Sample,
    Trade,
)
from schemas.settings import SchemaRegistrySettings, WindowSettings

CODEC = Codec(SchemaRegistrySettings())
CHANNELS = Market50()
EVENTS = real_events(40)
VALID = encoded(EVENTS)
NUM_FUZZED = 10_000
_MAX_MESSAGE_BYTES = 1_000  # of what a dead letter says, twice: in its value and in a header


class Outcomes(NamedTuple):
    """What became of records: the events, and how many were poison by reason."""

    events: list[MarketEvent]
    reasons: dict[str, int]


def event_of(record: RawRecord) -> MarketEvent:
    """As the worker does it. Raises PoisonRecord."""
    event = CODEC.decode_event(record.value, record.headers)
    CHANNELS.check(event)
    return event


def outcomes(records: list[RawRecord]) -> Outcomes:
    """Anything but an event or PoisonRecord gets through, as do dead letters out of proportion."""
    events: list[MarketEvent] = []
    reasons: dict[str, int] = {}
    for record in records:
        try:
            event = event_of(record)
        except PoisonRecord as poison:
            assert_fits_a_letter(record, poison)
            reasons[poison.reason] = reasons.get(poison.reason, 0) + 1
        else:
            assert type(event) is MarketEvent
            assert CODEC.decode_event(CODEC.encode_event(event)) == event
            events.append(event)
    return Outcomes(events, reasons)


def assert_fits_a_letter(record: RawRecord, poison: PoisonRecord) -> None:
    """The broker takes a letter if it took the record: the reason adds little to it."""
    assert len(str(poison).encode()) <= _MAX_MESSAGE_BYTES
    letter = letter_of(record, str(poison))
    assert CODEC.decode_dead_letter(CODEC.encode_dead_letter(letter)) == letter


def letter_of(record: RawRecord, message: str) -> DeadLetter:
    why = ("realtime", "decode", "bad_avro", "PoisonRecord", message, 1, 1)
    return DeadLetter(b"k", record.value, list(record.headers), "t", 0, 1, *why)


def assert_finite(events: list[MarketEvent]) -> None:
    """In windows of one step, so that every row is handed out, and in batches of all sizes."""
    store = WindowStore(CHANNELS, WindowSettings(num_steps=1, max_symbols=4))
    store.assign(("t", 0))
    begin, size = 0, 1
    while begin < len(events):
        batch = events[begin : begin + size]
        num = len(batch)
        appended = store.append(
            [("t", 0)] * num,
            range(begin, begin + num),
            columns_of(batch),
            np.ones(num, bool),
            np.zeros(num, np.int64),
        )
        assert appended.windows.shape == (num, 50, 1)
        assert appended.windows.dtype == np.float32
        assert np.isfinite(appended.windows).all()
        begin, size = begin + num, size % 64 + 1
    assert store.replay_offset(("t", 0), len(events)) <= len(events)


def test_mutations_of_real_events_decode_or_are_poison() -> None:
    """And both happen often, in every kind and for many reasons, or this would prove little."""
    seen = outcomes(list(fuzzed(VALID, NUM_FUZZED, seed=1)))
    assert_finite(seen.events)
    kinds = {type(event.payload) for event in seen.events}
    assert kinds == {Trade, Quote, Book, Bar, Sample}
    assert len(seen.events) > NUM_FUZZED // 10
    assert seen.reasons.keys() == REASONS


REASONS = {
    "bad_avro", "unknown_schema", "no_value", "bad_name", "bad_time", "bad_sequence", "bad_price",
    "bad_size", "negative_size", "not_finite", "bad_book", "bad_sample",
}  # fmt: skip


@given(seed=st.integers(0, 2**32), num_records=st.integers(1, 60))
def test_whatever_the_seed(seed: int, num_records: int) -> None:
    assert_finite(outcomes(list(fuzzed(VALID, num_records, seed))).events)


NAMES = st.one_of(st.just(FINGERPRINT_HEADER), st.text(st.characters(codec="utf-8"), max_size=20))
HEADERS = st.one_of(
    st.just(FINGERPRINT),
    st.lists(st.tuples(NAMES, st.one_of(st.none(), st.binary(max_size=40))), max_size=5),
)


@given(value=st.one_of(st.none(), st.binary(max_size=300)), headers=HEADERS)
def test_bytes_of_any_kind(value: bytes | None, headers: Headers) -> None:
    outcomes([RawRecord(value, headers)])


@st.composite
def almost_avro(draw: st.DrawFn) -> RawRecord:
    """The event's frame with numbers, texts and payloads of hypothesis' choosing."""
    longs = st.one_of(st.integers(0, 6), st.integers(-(2**70), 2**70)).map(varint)
    doubles = st.floats(width=64).map(lambda number: struct.pack("<d", number))
    texts = st.one_of(st.text(max_size=130).map(_text), st.binary(max_size=20).map(_bytes), longs)
    sides = st.lists(doubles, max_size=24).map(lambda numbers: _bytes(b"".join(numbers)))
    payloads = st.lists(st.one_of(doubles, sides, longs), max_size=7).map(b"".join)
    union = st.one_of(st.just(varint(0)), longs.map(lambda number: varint(1) + number), longs)
    branch = st.one_of(st.integers(0, 4), st.integers(-7, 2**40)).map(varint)
    pieces = [draw(one) for one in (texts, texts, texts, longs, union, branch, payloads)]
    return RawRecord(b"".join(pieces), FINGERPRINT)


def _text(text: str) -> bytes:
    return _bytes(text.encode("utf-8", "surrogatepass"))


def _bytes(raw: bytes) -> bytes:
    return varint(len(raw)) + raw


@given(records=st.lists(almost_avro(), max_size=10))
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_frames_of_an_event_with_anything_in_them(records: list[RawRecord]) -> None:
    assert_finite(outcomes(records).events)


@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("decode", [CODEC.decode_feature, CODEC.decode_dead_letter])
def test_features_and_letters_decode_or_are_poison_too(
    decode: Callable[[bytes | None, Headers], Any], seed: int
) -> None:
    """What a subscriber and ``tapeline dlq`` meet."""
    for value, headers in fuzzed(OTHERS[decode.__name__], 20, seed):
        with suppress(PoisonRecord):
            decode(value, headers)


def _others() -> dict[str, list[RawRecord]]:
    feature = FeatureVector(
        "id", "S", "V", 1, "realtime", "m", "c", "t", 0, 1, np.ones(64, np.float32), {"up": 0.5}
    )
    headers: Headers = [("a", None), ("b", b"x"), *FINGERPRINT]
    letter = letter_of(RawRecord(VALID[0].value, headers), "why")
    return {
        "decode_feature": [RawRecord(CODEC.encode_feature(feature), [])],
        "decode_dead_letter": [RawRecord(CODEC.encode_dead_letter(letter), [])],
    }


OTHERS = _others()


BOMBS = {
    "a length beyond memory": varint(2**62),
    "a length of 2 GB": varint(2**31 - 1),
    "a length below zero": varint(-(2**40)),
    "an endless varint": b"\xff" * 1_000_000,
    "a varint of zeros": b"\x80" * 1_000_000 + b"\0",
    "a megabyte that is no text": _bytes(b"\xff" * 1_000_000),
    "a megabyte of text": _bytes(b"a" * 1_000_000),
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("field", range(7))
def test_a_bomb_in_any_field_takes_memory_in_proportion(bomb: bytes, field: int) -> None:
    book = next(record for record, event in zip(VALID, EVENTS, strict=True) if _is_book(event))
    pieces = fields_of(book.value or b"")
    pieces[field] = bomb
    value = b"".join(pieces) + b"a" * 100
    tracemalloc.start()
    try:
        with pytest.raises(PoisonRecord):
            event_of(RawRecord(value, FINGERPRINT))
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000 + 20 * len(value)


def _is_book(event: MarketEvent) -> bool:
    return isinstance(event.payload, Book)


@pytest.mark.skipif(not CAPTURES.is_dir(), reason=f"no captures, simulated only: {CAPTURES}")
def test_real_captures_are_among_the_mutated() -> None:
    assert any(event.venue.startswith("binance") for event in EVENTS)
