"""Records that a lane should never hold: random ones, and real events with something amiss.

Everything comes from a seed, so that a failure can be had again.
"""

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np

from schemas.codec import FINGERPRINT_HEADER, Codec, fingerprint, schema_text
from schemas.messages import Bar, Headers, MarketEvent, Sample
from schemas.settings import SchemaRegistrySettings
from tapeline.simulator import simulate, symbol_names
from tapeline.sources import open_source

CAPTURES = Path(__file__).parents[1] / "../shared/data/binance_feeds"
START_US = 1_700_000_000_000_000
VENUE = "fuzz"  # of the simulated ones: more than one flipped bit away from any other tape's


class RawRecord(NamedTuple):
    """What a producer may send: value and headers."""

    value: bytes | None
    headers: Headers


FINGERPRINT: Headers = [(FINGERPRINT_HEADER, fingerprint(json.loads(schema_text("market_event"))))]


def real_events(num_events: int) -> list[MarketEvent]:
    """Events of every payload kind: simulated, captured where the captures are, and of our own."""
    simulated = simulate(
        symbols=symbol_names(3), seed=11, start_time_us=START_US, venue=VENUE, num_events=num_events
    )
    events = list(simulated)
    for path in sorted(CAPTURES.glob("*.gz")):
        with open_source(path) as source:
            events += islice(source, num_events)
    for number in range(num_events):
        price, time_us = 100 + number / 7, START_US + number
        bar = Bar(price, price + 1, price - 1, price + 0.5, 10.0 * number, 60_000_000)
        sample = Sample.from_values(np.linspace(-price, price, 50))
        events.append(MarketEvent(f"bar-{number}", "SIM01", VENUE, time_us, bar))
        events.append(MarketEvent(f"sample-{number}", "SIM02", VENUE, time_us, sample, number))
    return events


def encoded(events: Sequence[MarketEvent]) -> list[RawRecord]:
    """As our own producer sends them; every other one bare, with its fingerprint in a header."""
    codec = Codec(SchemaRegistrySettings())
    values = [codec.encode_event(event) for event in events]
    num_tag_bytes = len(codec.event_prefix)
    return [
        RawRecord(value[num_tag_bytes:], FINGERPRINT) if number % 2 else RawRecord(value, [])
        for number, value in enumerate(values)
    ]


def fuzzed(valid: Sequence[RawRecord], num_records: int, seed: int) -> Iterator[RawRecord]:
    """Records with one to three things amiss; some, by luck, are events all the same."""
    random = Random(seed)
    for _ in range(num_records):
        record = random.choice(valid)
        for _ in range(random.choice([1, 1, 2, 3])):
            record = random.choice(_MUTATIONS)(random, record, random.choice(valid))
        yield record


# Of the bytes, whatever they mean.


def _flip_bits(random: Random, record: RawRecord, other: RawRecord) -> RawRecord:
    value = bytearray(record.value or b"\0")
    for _ in range(random.choice([1, 1, 1, 8])):
        value[random.randrange(len(value))] ^= 1 << random.randrange(8)
    return record._replace(value=bytes(value))


def _cut(random: Random, record: RawRecord, other: RawRecord) -> RawRecord:
    value = record.value or b""
    begin, end = sorted(random.randrange(len(value) + 1) for _ in range(2))
    kept = random.choice([value[:end], value[begin:], value[:begin] + value[end:]])
    return record._replace(value=kept)


def _splice(random: Random, record: RawRecord, other: RawRecord) -> RawRecord:
    head, tail = record.value or b"", other.value or b""
    head, tail = head[: random.randrange(len(head) + 1)], tail[random.randrange(len(tail) + 1) :]
    return record._replace(value=head + tail)


def _insert(random: Random, record: RawRecord, other: RawRecord) -> RawRecord:
    value = record.value or b""
    at = random.randrange(len(value) + 1)
    return record._replace(value=value[:at] + _odd_bytes(random) + value[at:])


def _overwrite(random: Random, record: RawRecord, other: RawRecord) -> RawRecord:
    value, odd = record.value or b"", _odd_bytes(random)
    at = random.randrange(len(value) + 1)
    return record._replace(value=value[:at] + odd + value[at + len(odd) :])


def _replace_value(random: Random, record: RawRecord, other: RawRecord) -> RawRecord:
    value = random.choice([None, b"", random.randbytes(random.randrange(400)), _odd_bytes(random)])
    return record._replace(value=value)


def _odd_bytes(random: Random) -> bytes:
    """Length bombs, endless varints, long stretches."""
    return random.choice(
        [
            varint(random.choice(_ODD_LONGS)),
            random.choice([b"\xff", b"\x80"]) * random.choice([9, 10, 11, 70_000]),
            random.choice([b"\0", b"\2", b"\xc3", b"a"]) * random.choice([1, 16, 5_000, 200_000]),
            random.randbytes(random.randrange(1, 64)),
        ]
    )


# Of the fields, so that it is the event that is amiss and not the Avro.


def varint(number: int) -> bytes:
    """Avro's long: zigzag, seven bits a byte, lowest first."""
    zigzag = number << 1 if number >= 0 else (-number << 1) - 1
    encoded = bytearray()
    while zigzag > 0x7F:
        encoded.append(zigzag & 0x7F | 0x80)
        zigzag >>= 7
    return bytes([*encoded, zigzag])


def fields_of(value: bytes) -> list[bytes]:
    """A valid event in pieces: id, symbol, venue, time, sequence, branch of the payload, payload.

    Joined they give the value again.
    """
    pieces = []
    for _ in range(3):
        length, end = _read_varint(value)
        pieces.append(value[: end + length])
        value = value[end + length :]
    _, end = _read_varint(value)
    pieces.append(value[:end])
    value = value[end:]
    numbered, end = _read_varint(value)
    if numbered:
        end += _read_varint(value[end:])[1]
    pieces.append(value[:end])
    _, branch_end = _read_varint(value[end:])
    return [*pieces, value[end : end + branch_end], value[end + branch_end :]]


def _read_varint(value: bytes) -> tuple[int, int]:
    end = next(index for index, byte in enumerate(value[:_MAX_VARINT_BYTES]) if byte < 0x80) + 1
    zigzag = sum((byte & 0x7F) << 7 * index for index, byte in enumerate(value[:end]))
    return zigzag >> 1 ^ -(zigzag & 1), end


def _replace_field(random: Random, record: RawRecord, other: RawRecord) -> RawRecord:
    try:
        pieces = fields_of(record.value or b"")
        others = fields_of(other.value or b"")
    except (StopIteration, IndexError):  # it is in ruins already
        return record
    at = random.randrange(len(pieces))
    text = random.choice(_ODD_TEXTS)
    odd_long = varint(random.choice(_ODD_LONGS))
    odd: list[bytes] = {
        3: [odd_long],
        4: [varint(1) + odd_long, odd_long, varint(0)],
        5: [odd_long, varint(random.randrange(6))],
        6: [_odd_payload(random, pieces[6])],
    }.get(at, [varint(len(text)) + text, odd_long + text])
    pieces[at] = random.choice([*odd, *odd, others[at]])
    return record._replace(value=b"".join(pieces))


def _odd_payload(random: Random, payload: bytes) -> bytes:
    """Other numbers where numbers may be: a double at some place, or a book of odd levels."""
    number = struct.pack("<d", random.choice(_ODD_DOUBLES))
    at = random.randrange(0, max(1, len(payload) - 7))
    aligned = random.choice([at, at // 8 * 8, (at + 14) // 16 * 16 + 2])
    levels = b"".join(
        struct.pack("<dd", random.choice(_ODD_DOUBLES), random.choice(_ODD_DOUBLES))
        for _ in range(random.choice([0, 1, 2, 10, 11]))
    )
    side = varint(len(levels)) + levels
    values = np.array(random.choices(_ODD_DOUBLES, k=random.choice([0, 1, 49, 50, 51, 5_000])))
    with np.errstate(over="ignore"):
        sample = values.astype("<f4").tobytes()
    return random.choice(
        [
            payload[:aligned] + number + payload[aligned + 8 :],
            side + side,
            varint(len(sample)) + sample,
            number * random.randrange(7) + varint(random.choice(_ODD_LONGS)),
        ]
    )


_ODD_LONGS = [
    0, 1, -1, 2, 5, -5, 127, 128, 129, 2**31 - 1, 2**31, 2**32, -(2**31), 2**61, 2**62, 2**62 + 1,
    2**63 - 1, -(2**63), 2**64, 2**70, START_US, 20_000_000,
]  # fmt: skip
_ODD_DOUBLES = [
    0.0, -0.0, 5e-324, 1e-300, 1e-12, 9.9e-13, 1.0, 100.0, 1e15, 1.1e15, 1e18, 1.1e18, 3.5e38,
    1e308, -1.0, -1e308, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
_ODD_TEXTS = [
    b"", b"a", b"a" * 128, b"a" * 129, b"a" * 100_000, "é".encode() * 128, "𝄞".encode() * 128,
    b"\0", b"\n", b"{}'\";--", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf5\x80\x80\x80",
    b"\xff" * 100_000, "\u202e\u0000\ufeff".encode(),
]  # fmt: skip


# Of the headers.


def _replace_headers(random: Random, record: RawRecord, other: RawRecord) -> RawRecord:
    right = list(record.headers)
    wrong = (FINGERPRINT_HEADER, random.choice(_ODD_FINGERPRINTS))
    extra = [(random.choice(_ODD_NAMES), random.choice(_ODD_HEADER_VALUES)) for _ in range(3)]
    headers = random.choice(
        [
            [],
            [wrong],
            [wrong, *right],
            [*right, wrong],
            [*right, *right],
            [*extra, *right],
            [*right, *extra],
            extra * 50 + right,
        ]
    )
    return record._replace(headers=headers)


_ODD_FINGERPRINTS: list[bytes | None] = [
    None, b"", b"0", b"0123456789abcdef", b"8145035E693DCC65", b"1e0d4676ddb2ec63",
    b"\xff" * 16, b"\xff" * 100_000, "𝄞".encode(),
]  # fmt: skip
# Not a surrogate: confluent-kafka 2.16 crashes the process that sends one.
_ODD_NAMES = [
    "", "a", "a" * 30_000, "é", "𝄞", "\0", "a\0b", "traceparent", "source-appended-us",
    "dlq-reason", "dlq-attempts", "dlq-replayed-from",
]  # fmt: skip
_ODD_HEADER_VALUES: list[bytes | None] = [None, b"", b"-1", b"\xff" * 40, b"9" * 5_000, b"x:y:z"]

_MAX_VARINT_BYTES = 10
Mutation = Callable[[Random, RawRecord, RawRecord], RawRecord]
_MUTATIONS: list[Mutation] = [
    _flip_bits,
    _flip_bits,
    _cut,
    _splice,
    _insert,
    _overwrite,
    _replace_value,
    _replace_field,
    _replace_field,
    _replace_field,
    _replace_field,
    _replace_headers,
]
