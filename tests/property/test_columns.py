"""The compiled ways in and out give what the codec gives, on whatever there is to read."""

from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from columns import DECODER, columns_of
from fuzzing import RawRecord, fuzzed
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz_decode import VALID
from test_windows import payloads

from consumers.columns import BAR, BOOK, NO_SEQUENCE, QUOTE, SAMPLE, TRADE, EventColumns, name_of
from consumers.encoding import FeatureEncoder, Sources
from inference.client import Inference
from schemas.codec import FINGERPRINT_HEADER, Codec, fingerprint, released_schemas
from schemas.errors import PoisonRecord
from schemas.messages import (
    Bar,
    Book,
    FeatureVector,
    Flags,
    MarketEvent,
    Payload,
    Quote,
    Sample,
    Trade,
)
from schemas.settings import SchemaRegistrySettings

CODEC = Codec(SchemaRegistrySettings())
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=128)
EVENTS = st.builds(
    MarketEvent,
    NAMES,
    NAMES,
    NAMES,
    st.integers(1, 2**62),
    payloads(),
    st.one_of(st.none(), st.integers(0, 2**62)),
)
SIDES = {"unknown": 0.0, "buy": 1.0, "sell": -1.0}


def shown(payload: Payload) -> tuple[int, list[float]]:
    """Kind and values of a payload, as its columns should have them."""
    match payload:
        case Trade(price, size, side):
            return TRADE, [price, size, SIDES[side]]
        case Quote(bid_price, bid_size, ask_price, ask_size):
            return QUOTE, [bid_price, bid_size, ask_price, ask_size]
        case Book():
            levels = np.zeros((4, 10))
            for side, values in enumerate((payload.bid_levels, payload.ask_levels)):
                levels[2 * side : 2 * side + 2, : len(values)] = values.T
            return BOOK, levels.ravel().tolist()
        case Bar(open_, high, low, close, volume, _):
            return BAR, [open_, high, low, close, volume]
        case Sample(values):
            return SAMPLE, np.frombuffer(values, "<f4").tolist()


def assert_shows(columns: EventColumns, row: int, event: MarketEvent) -> None:
    assert columns.ids[row] == event.event_id
    assert columns.keys[row] == event.symbol.encode()
    assert name_of(columns.symbols[row]) == (event.venue, event.symbol)
    assert columns.times_us[row] == event.event_time_us
    sequence = NO_SEQUENCE if event.sequence is None else event.sequence
    assert columns.sequences[row] == sequence
    kind, values = shown(event.payload)
    assert columns.kinds[row] == kind
    assert columns.values[row].tolist() == [*values, *[0.0] * (50 - len(values))]
    assert CODEC.encode_event(event)[10:].startswith(columns.heads[row])


def decoded_one_by_one(records: Sequence[RawRecord]) -> list[MarketEvent | str]:
    """By the codec: each record's event, or why it is poison."""
    found: list[MarketEvent | str] = []
    for record in records:
        try:
            event = CODEC.decode_event(record.value, record.headers)
            DECODER._check(event)
            found.append(event)
        except PoisonRecord as error:
            found.append(error.reason)
    return found


def assert_same(records: Sequence[RawRecord]) -> tuple[int, int]:
    """As columns and one by one; how many were events, and how many poison."""
    columns, poison = DECODER.decode(
        [record.value for record in records], [record.headers for record in records]
    )
    row = 0
    for place, expected in enumerate(decoded_one_by_one(records)):
        if isinstance(expected, str):
            assert poison[place].reason == expected
        else:
            assert place not in poison
            assert_shows(columns, row, expected)
            row += 1
    assert row == len(columns)
    return row, len(poison)


@given(st.lists(EVENTS, max_size=12))
def test_every_event_is_read_as_the_codec_reads_it(events: list[MarketEvent]) -> None:
    records = [RawRecord(CODEC.encode_event(event), []) for event in events]
    assert assert_same(records) == (len(events), 0)


def test_records_of_any_kind_are_taken_or_refused_as_by_the_codec() -> None:
    """Mutations of real events, of every kind: bits, cuts, lengths, numbers out of bounds."""
    num_events, num_poison = assert_same(list(fuzzed(VALID, 6_000, seed=5)))
    assert num_events > 600
    assert num_poison > 600


@given(st.integers(0, 2**32), st.integers(1, 40))
def test_whatever_the_seed(seed: int, num_records: int) -> None:
    assert_same(list(fuzzed(VALID, num_records, seed)))


def test_bare_avro_with_a_fingerprint_in_its_header_is_read_too() -> None:
    event = MarketEvent("id", "S", "V", 7, Quote(1.0, 2.0, 3.0, 4.0), 5)
    headers = [(FINGERPRINT_HEADER, fingerprint(released_schemas("market_event")[0]))]
    bare = RawRecord(CODEC.encode_event(event)[10:], headers)
    assert assert_same([bare, RawRecord(CODEC.encode_event(event), []), bare]) == (3, 0)


def test_a_longer_spelling_of_a_length_is_no_other_symbol() -> None:
    """Avro lets a number take more bytes than it needs."""
    value = CODEC.encode_event(MarketEvent("id", "S", "V", 7, Trade(1.0, 2.0)))
    assert value[13:17] == b"\x02S\x02V"
    longer = value[:13] + b"\x82\x00S\x02V" + value[17:]
    columns, poison = DECODER.decode([value, longer], [(), ()])
    assert not poison
    assert columns.symbols[0] == columns.symbols[1]


def test_those_chosen_are_kept_in_order() -> None:
    events = [MarketEvent(f"e{number}", "S", "V", number, Trade(1.0, 1.0)) for number in (1, 2, 3)]
    kept = columns_of(events).those([True, False, True])
    assert kept.ids == ["e1", "e3"]
    assert kept.times_us.tolist() == [1, 3]


@given(
    st.lists(EVENTS, min_size=1, max_size=8),
    st.integers(0, 5),
    st.integers(1, 70),
    st.integers(0, 2**32),
    NAMES,
)
def test_features_are_written_as_the_codec_writes_them(
    events: list[MarketEvent], num_scores: int, num_features: int, seed: int, name: str
) -> None:
    random, numbers = Random(seed), np.random.default_rng(seed)
    names = tuple(f"{name}-{number}" for number in range(num_scores))
    encoder = FeatureEncoder(CODEC, f"c-{name}", names)
    inference = Inference(
        numbers.normal(size=(9, num_features)).astype(np.float32),
        numbers.normal(size=(9, num_scores)).astype(np.float32),
        f"m-{name}",
    )
    rows = [random.randrange(9) for _ in events]
    flags = [random.randrange(64) for _ in events]
    places = [(random.randrange(2**31), random.randrange(2**63 - 1)) for _ in events]
    appended_us = [random.randrange(2**55) for _ in events]
    sources = Sources(
        columns_of(events).heads,
        [number for number, _ in places],
        [offset for _, offset in places],
        appended_us,
    )
    values = encoder.encode(
        "lane", f"topic-{name}", sources, inference, rows, np.array(flags, np.uint8)
    )
    for index, (event, row) in enumerate(zip(events, rows, strict=True)):
        scores = dict(zip(names, inference.scores[row].tolist(), strict=True))
        expected = FeatureVector(
            event_id=event.event_id,
            symbol=event.symbol,
            venue=event.venue,
            event_time_us=event.event_time_us,
            lane="lane",
            model_version=inference.model_version,
            channels_version=f"c-{name}",
            source_topic=f"topic-{name}",
            source_partition=places[index][0],
            source_offset=places[index][1],
            features=inference.features[row],
            scores=scores,
            flags=Flags(flags[index]),
            source_appended_us=appended_us[index],
        )
        assert values[index] == CODEC.encode_feature(expected)


def test_no_features_are_no_bytes() -> None:
    nothing = Inference(np.zeros((0, 4), np.float32), np.zeros((0, 0), np.float32), "m")
    encoder = FeatureEncoder(CODEC, "c", ())
    assert (
        encoder.encode("lane", "topic", Sources([], [], [], []), nothing, [], np.zeros(0, np.uint8))
        == []
    )


def test_a_sample_of_another_size_is_poison() -> None:
    value = CODEC.encode_event(MarketEvent("i", "S", "V", 1, Sample.from_values(np.zeros(49))))
    _, poison = DECODER.decode([value], [()])
    with pytest.raises(PoisonRecord, match="has 50 values, not 49"):
        raise poison[0]
