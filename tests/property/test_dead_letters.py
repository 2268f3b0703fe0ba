"""Dead letters, their receipts, and what may be cut off: whatever came in whatever order."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.envelopes import ATTEMPTS_HEADER, REPLAYED_FROM_HEADER
from schemas.codec import Codec
from schemas.errors import ConfigError
from schemas.messages import DeadLetter, Headers
from schemas.settings import SchemaRegistrySettings
from tapeline.dlq import (
    Letter,
    LetterId,
    Receipt,
    Selection,
    Unreadable,
    fold,
    replayed_headers,
)
from tapeline.dlq.letters import Record, classify, receipt_headers
from tapeline.reading import parse_time_us

CODEC = Codec(SchemaRegistrySettings())
DEAD = DeadLetter(b"k", b"v", (), "events", 0, 5, "l", "decode", "bad_avro", "E", "m", 1, 10**15)
PLACES = [("l", 0), ("l", 1), ("m", 0)]


@st.composite
def topics(draw: st.DrawFn) -> list[Record]:
    """Records of some partitions by offset, with gaps; each receipt after the letter it closes."""
    records: list[Record] = []
    for place in PLACES:
        offset, earlier = 0, []
        for kind in draw(st.lists(st.sampled_from("lllruu"), max_size=12)):
            offset += draw(st.integers(1, 3))
            id = LetterId(*place, offset)
            if kind == "r" and earlier:
                state = draw(st.sampled_from(("replayed", "purged")))
                records.append(Receipt(id, draw(st.sampled_from(earlier)), state))
                continue
            earlier.append(offset)
            stranger = Unreadable(id, None, None, (), 0, "no Avro")
            records.append(stranger if kind == "u" else Letter(id, DEAD))
    return records


def named_by(records: Sequence[Record]) -> set[LetterId]:
    """The letters that receipts name."""
    return {
        LetterId(one.id.lane, one.id.partition, one.letter_offset)
        for one in records
        if isinstance(one, Receipt)
    }


@given(topics(), st.data())
def test_a_letter_is_open_if_and_only_if_no_receipt_names_it(
    records: list[Record], data: st.DataObject
) -> None:
    """Whatever the order, however often a record is read."""
    shuffled = data.draw(st.permutations(records))
    index = fold(shuffled)
    letters = {one.id for one in records if isinstance(one, Letter)}
    strangers = {one.id for one in records if isinstance(one, Unreadable)}
    closed = named_by(records)
    assert set(index.ids("open")) == letters - closed
    assert set(index.ids("unreadable")) == strangers - closed
    assert set(index.ids("replayed", "purged")) == closed
    assert {one.id: one.state for one in index} == {one.id: one.state for one in fold(records)}
    counts = index.counts().values()
    assert sum(count.total() for count in counts) == len(letters) + len(strangers)


@given(topics(), st.data())
def test_a_purge_cuts_off_nothing_open_and_opens_nothing(
    records: list[Record], data: st.DataObject
) -> None:
    """What is left folds to the same states; the count is what is gone; no more could be cut."""
    before = fold(records)
    states = {one.id: one.state for one in before}
    still_open = [id for id, state in states.items() if state in ("open", "unreadable")]
    closing = frozenset(data.draw(st.lists(st.sampled_from(still_open))) if still_open else ())
    for place in PLACES:
        own = [one for one in records if one.id[:2] == place]
        end = own[-1].id.offset + 2 if own else 0  # a transaction marker may be last
        run = before.leading_run(place, end, closing)
        cut = [one for one in own if one.id.offset < run.before]
        left = [one for one in own if one.id.offset >= run.before]
        assert run.num_records == len(cut)
        kept_open = {one.id for one in cut} & set(still_open)
        assert kept_open <= closing
        after = {one.id: one.state for one in fold(left)}
        assert after == {id: states[id] for id in after}
        if left:
            assert left[0].id in set(still_open) - closing
        else:
            assert run.before == end


@given(st.permutations(["replayed", "purged", "replayed"]))
def test_purged_outlasts_replayed(states: list[str]) -> None:
    receipts = [Receipt(LetterId("l", 0, 2 + n), 1, one) for n, one in enumerate(states)]  # type: ignore[arg-type]
    assert fold([Letter(LetterId("l", 0, 1), DEAD), *receipts]).ids("purged")


HEADERS = st.lists(
    st.tuples(
        st.sampled_from(["dlq-receipt", "dlq-state", "avro-fingerprint", "x"]),
        st.none() | st.binary(max_size=9) | st.sampled_from([b"3", b"replayed", b"purged", b"-1"]),
    ),
    max_size=4,
)


@given(st.none() | st.binary(max_size=60), HEADERS)
def test_any_record_is_classified(value: bytes | None, headers: Headers) -> None:
    """A receipt has no value, and names an earlier letter and a state; it is read as written."""
    id = LetterId("l", 0, 7)
    record = classify(CODEC, id, None, value, headers, 10**15)
    assert record.id == id
    if isinstance(record, Receipt):
        assert value is None
        assert 0 <= record.letter_offset < id.offset
        written = receipt_headers(record.letter_offset, record.state)
        assert classify(CODEC, id, None, None, written, 0) == record
    else:
        assert isinstance(record, Unreadable)


@pytest.mark.parametrize("offset", [b"7", b"8", b"-1", b"1_0", b"\xd9\xa1", b"", b"9" * 30])
def test_a_receipt_of_no_earlier_letter_closes_nothing(offset: bytes) -> None:
    headers = [("dlq-receipt", offset), ("dlq-state", b"replayed")]
    record = classify(CODEC, LetterId("l", 0, 7), None, None, headers, 0)
    assert isinstance(record, Unreadable)


@given(HEADERS, st.integers(1, 10**6), st.none() | st.just(b"first:0:1"))
def test_a_replay_adds_two_headers_and_keeps_the_rest(
    headers: list[tuple[str, bytes | None]], attempts: int, earlier: bytes | None
) -> None:
    """Each of the two is there once, and says where it failed last."""
    carried = [(ATTEMPTS_HEADER, b"1"), (REPLAYED_FROM_HEADER, earlier)] if earlier else []
    dead = replace(DEAD, headers=[*carried, *headers], attempts=attempts)
    sent = replayed_headers(Letter(LetterId("l", 0, 1), dead))
    assert sent == [
        *headers,
        (ATTEMPTS_HEADER, str(attempts).encode()),
        (REPLAYED_FROM_HEADER, b"events:0:5"),
    ]


@given(st.text(), st.integers(0, 2**40), st.integers(0, 2**62))
def test_an_id_is_read_as_it_is_shown(lane: str, partition: int, offset: int) -> None:
    id = LetterId(lane or "l", partition, offset)
    assert LetterId.parse(str(id)) == id


@pytest.mark.parametrize("text", ["", "x", "a:1", ":1:2", "a:-1:2", "a:1:2.0", "a:1:x", "a:1:²"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="lane:partition:offset"):
        LetterId.parse(text)


@pytest.mark.parametrize(
    ("text", "expected_us"),
    [
        ("90s", 10**15 - 90 * 10**6),
        ("2h", 10**15 - 7200 * 10**6),
        ("7d", 10**15 - 7 * 86_400 * 10**6),
        ("1970-01-02", 86_400 * 10**6),
        ("1970-01-01T00:00:00.000001", 1),
        ("1970-01-01T02:00+02:00", 0),
        ("1970-01-01T00:00:01Z", 10**6),
    ],
)
def test_times_are_iso_or_a_span_back(text: str, expected_us: int) -> None:
    assert parse_time_us(text, 10**15) == expected_us


@pytest.mark.parametrize("text", ["", "2", "h", "2w", "-2h", "yesterday", "2024-13-01", "٢h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="2h"):
        parse_time_us(text, 0)


def test_a_selection_is_ids_or_filters() -> None:
    with pytest.raises(AssertionError, match="not both"):
        Selection(ids=frozenset([LetterId("l", 0, 1)]), lanes=("l",))
