"""The ledger owes what the worker's windows give, and a clean book has no blemish to hide.

Tiny windows (3 steps, 3 symbols, 8 idle records), so that every rule that empties one fires.
"""

import math
import zlib
from collections.abc import Collection, Sequence
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import numpy as np
from columns import columns_of
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.channels import Market50
from consumers.windows import WindowStore
from schemas.lanes import LaneSettings
from schemas.messages import MarketEvent, Quote
from schemas.settings import WindowSettings
from tapeline.bookkeeping import Event, Sightings, Source
from tapeline.ledger import Delivery, Feature, Ledger, judge

SMALL = WindowSettings(num_steps=3, max_gap_s=10, max_idle_records=8, max_symbols=3)
START_US = 1_700_000_000_000_000
QUOTE = Quote(1.0, 1.0, 2.0, 1.0)
MAX_OFFSET = 10_000


class Step(NamedTuple):
    """One record of a tape; ``is_copy``: its id was there before, in its partition."""

    partition: int
    offset: int
    event: Event
    is_copy: bool


def tape(num_records: int, seed: int) -> list[Step]:
    """Two partitions, up to five symbols for three places, jumps of time, gaps, copies."""
    random = Random(seed)
    symbols = "ABCDE"[: random.choice([1, 2, 4, 5])]
    loyalty = random.choice([0.3, 0.6, 0.9])
    offsets = [0, 0]
    times_us: dict[tuple[int, str], int] = {}
    seen: list[list[Event]] = [[], []]
    symbol, steps = "A", []
    for number in range(num_records):
        partition = int(random.random() < 0.2)
        offsets[partition] += random.choice([1, 1, 1, 3])
        if seen[partition] and random.random() < 0.1:
            steps.append(Step(partition, offsets[partition], random.choice(seen[partition]), True))
            continue
        if random.random() > loyalty:
            symbol = random.choice(symbols)
        elapsed_us = random.choice([0, 1, 150_000, 1_000_000, 10_000_000, 10_000_001, -400_000])
        time_us = times_us.get((partition, symbol), START_US) + elapsed_us
        times_us[partition, symbol] = time_us
        event = Event(f"id-{number}", "V", symbol, time_us)
        seen[partition].append(event)
        steps.append(Step(partition, offsets[partition], event, False))
    return steps


TAPES = st.builds(tape, st.integers(1, 120), st.integers(0, 2**32))
LANES = st.builds(
    lambda stride, min_interval_ms: LaneSettings(
        name="lane",
        rank=1,
        deadline_ms=1,
        reserved_share=0,
        stride=stride,
        min_interval_ms=min_interval_ms,
    ),
    st.sampled_from([1, 1, 2]),
    st.sampled_from([0, 0, 300, 2000]),
)


def given_by_the_store(
    steps: Sequence[Step],
    lane: LaneSettings,
    at: Sequence[int],
    late: Collection[Step] = (),
) -> list[tuple[int, int]]:
    """The records whose windows the worker's own store hands out, fed in these batches.

    ``late``: in their windows all the same, but no feature is wanted of them.
    """
    store = WindowStore(Market50(), SMALL)
    for number in (0, 1):
        store.assign(("lane", number))
    handed: list[tuple[int, int]] = []
    for start, end in pairwise(at):
        batch = [step for step in steps[start:end] if not step.is_copy]
        appended = store.append(
            [("lane", step.partition) for step in batch],
            [step.offset for step in batch],
            columns_of([MarketEvent(*_fields(step.event)) for step in batch]),
            np.array([_is_sampled(step, lane) and step not in late for step in batch], bool),
            np.full(len(batch), int(lane.min_interval_ms * 1000), np.int64),
        )
        given_out = zip(batch, appended.given, strict=True)
        handed += [(step.partition, step.offset) for step, given in given_out if given]
    return handed


def new_ledger(
    steps: Sequence[Step],
    lane: LaneSettings,
    delivery: Delivery,
    firsts: Sequence[int] = (0, 0),
) -> Ledger:
    ledger = Ledger(lane, SMALL, Sightings(3600), delivery, max_violations=MAX_OFFSET)
    for number in (0, 1):
        ledger.add_partition(number, firsts[number], MAX_OFFSET, committed=MAX_OFFSET)
    for step in steps:
        if step.offset >= firsts[step.partition]:
            ledger.add_record(step.partition, step.offset, step.event, appended_us(step))
    return ledger


def appended_us(step: Step) -> int:
    """One offset a millisecond."""
    return START_US + step.offset * 1000


def verdict(ledger: Ledger, features: Sequence[Feature], asked_us: int = START_US) -> list[str]:
    """The kinds of all violations."""
    for at, feature in enumerate(features):
        ledger.add_feature(feature._replace(at=Source("out", feature.source.partition, at)))
    ends = {0: MAX_OFFSET, 1: MAX_OFFSET}
    judge({ledger: ends}, settled=True, asked_us=asked_us)
    return [one.kind for one in ledger.violations()]


def lost(ledger: Ledger) -> set[tuple[int, int]]:
    return {one.source[1:] for one in ledger.violations() if one.kind == "lost"}


def feature_of(step: Step, topic: str, at_us: int = START_US) -> Feature:
    source = Source(topic, step.partition, step.offset)
    bits = f"{step.partition}:{step.offset}".encode()
    return Feature(source, source, step.event, bits, at_us)


@st.composite
def cuts(draw: st.DrawFn, num_records: int) -> list[int]:
    return sorted({0, num_records} | draw(st.sets(st.integers(0, num_records), max_size=12)))


@given(steps=TAPES, lane=LANES, data=st.data())
@settings(max_examples=150, deadline=None)
def test_owed_is_what_the_windows_give(
    steps: list[Step], lane: LaneSettings, data: st.DataObject
) -> None:
    """Two bookkeepings, written apart from each other, of every rule that there is."""
    expected = given_by_the_store(steps, lane, data.draw(cuts(len(steps))))
    ledger = new_ledger(steps, lane, "at_least_once")
    verdict(ledger, [])
    assert lost(ledger) == set(expected)
    audit = ledger.audit()
    assert audit.owed == len(expected)
    assert audit.owed + audit.warm_up + audit.thinned + audit.duplicates == len(steps)


@given(steps=TAPES, lane=LANES, data=st.data())
@settings(max_examples=100, deadline=None)
def test_retention_never_accuses_the_innocent(
    steps: list[Step], lane: LaneSettings, data: st.DataObject
) -> None:
    """With the beginning gone, what was rightly published is clean, and what is lost was owed.

    Without copies: one whose original is gone and was never published looks like an original.
    """
    steps = [step for step in steps if not step.is_copy]
    given_out = set(given_by_the_store(steps, lane, [0, len(steps)]))
    firsts = [data.draw(st.integers(0, 60)) for _ in (0, 1)]
    features = [
        feature_of(step, lane.topic) for step in steps if (step.partition, step.offset) in given_out
    ]
    assert verdict(new_ledger(steps, lane, "exactly_once", firsts), features) == []
    ledger = new_ledger(steps, lane, "exactly_once", firsts)
    verdict(ledger, [])
    assert lost(ledger) <= given_out


@given(steps=TAPES, lane=LANES, data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_single_blemish_is_seen(
    steps: list[Step], lane: LaneSettings, data: st.DataObject
) -> None:
    given_out = set(given_by_the_store(steps, lane, [0, len(steps)]))
    clean = [
        feature_of(step, lane.topic) for step in steps if (step.partition, step.offset) in given_out
    ]
    for delivery in ("at_least_once", "exactly_once"):
        assert verdict(new_ledger(steps, lane, delivery), clean) == []
    if not clean:
        return
    at = data.draw(st.integers(0, len(clean) - 1))
    one = clean[at]
    without = clean[:at] + clean[at + 1 :]

    def kinds(features: Sequence[Feature], delivery: Delivery = "exactly_once") -> set[str]:
        return set(verdict(new_ledger(steps, lane, delivery), features))

    assert kinds(without) == kinds(without, "at_least_once") == {"lost"}
    again = data.draw(st.integers(at + 1, len(clean)))
    doubled = [*clean[:again], one, *clean[again:]]
    assert kinds(doubled) == {"twice"}
    assert kinds(doubled, "at_least_once") == set()
    other_bits = one._replace(bits=b"other")
    assert kinds([*clean[:again], other_bits, *clean[again:]], "at_least_once") == {"differs"}
    for changed in (
        one._replace(event=one.event._replace(event_id="other")),
        one._replace(event=one.event._replace(symbol="Z")),
        one._replace(event=one.event._replace(event_time_us=1)),
        one._replace(source=one.source._replace(topic="other")),
    ):
        assert "lineage" in kinds([*clean[:at], changed, *clean[at + 1 :]], "at_least_once")
    stranger = data.draw(st.sampled_from(steps))
    if (stranger.partition, stranger.offset) not in given_out:
        added = [*clean, feature_of(stranger, lane.topic)]
        assert kinds(added, "at_least_once") & {"unowed", "twice"}
    for later, other in enumerate(clean[at + 1 :], at + 1):
        if other.source.partition == one.source.partition and other.event[1:3] == one.event[1:3]:
            swapped = list(clean)
            swapped[at], swapped[later] = other, one
            assert "order" in kinds(swapped, "at_least_once")
            break


class Pass(NamedTuple):
    """What a worker made of a tape in a lane that skips what is late.

    Attributes:
        num_skipped: records that would have had a feature, had they been in time.
        features: stamped as a broker does, in whole milliseconds, rounded down.
        asked_us: when the audit asked how far is committed.
    """

    num_skipped: int
    features: list[Feature]
    asked_us: int


SKIPPING = st.builds(
    lambda lane, deadline_ms: lane.model_copy(
        update={"expired": "skip", "deadline_ms": deadline_ms}
    ),
    LANES,
    st.sampled_from([0.3, 1, 2.5, 10, 40]),
)


def skipping_pass(steps: Sequence[Step], lane: LaneSettings, random: Random) -> Pass:
    """Prepares micro-batches now in time, now behind it, and publishes some while later."""
    at = sorted({0, len(steps), *random.choices(range(len(steps) + 1), k=8)})
    now_us = START_US
    published_us: dict[tuple[int, int], int] = {}
    late: set[Step] = set()
    for start, end in pairwise(at):
        batch = steps[start:end]
        newest_us = max(appended_us(step) for step in batch)
        now_us = max(now_us, newest_us + random.choice([0, 1, 700, 30_000])) + random.randrange(900)
        late |= {step for step in batch if lane.is_late(appended_us(step), now_us)}
        at_us = now_us + random.choice([0, 1, 1000, 20_000])
        published_us |= {(step.partition, step.offset): at_us // 1000 * 1000 for step in batch}
    timely = given_by_the_store(steps, lane, at)
    given_out = set(given_by_the_store(steps, lane, at, late))
    features = [
        feature_of(step, lane.topic, published_us[step.partition, step.offset])
        for step in steps
        if (step.partition, step.offset) in given_out
    ]
    return Pass(len(timely) - len(given_out), features, now_us)


@given(steps=TAPES, lane=SKIPPING, seed=st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_what_was_skipped_is_never_called_lost(
    steps: list[Step], lane: LaneSettings, seed: int
) -> None:
    """Nor what a second pass publishes again; and every record is counted once."""
    random = Random(seed)
    done = skipping_pass(steps, lane, random)
    again = [one._replace(appended_us=done.asked_us) for one in done.features]
    again = random.sample(again, random.randint(0, len(again)))
    again.sort(key=lambda one: one.source)
    runs: tuple[tuple[Delivery, list[Feature]], ...] = (
        ("exactly_once", done.features),
        ("at_least_once", [*done.features, *again]),
    )
    for delivery, features in runs:
        ledger = new_ledger(steps, lane, delivery)
        assert verdict(ledger, features, done.asked_us) == []
        audit = ledger.audit()
        assert (audit.skipped, audit.owed) == (done.num_skipped, len(done.features))
        ended = audit.owed + audit.skipped + audit.warm_up + audit.thinned + audit.duplicates
        assert ended == audit.records == len(steps)


@given(steps=TAPES, lane=SKIPPING, data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_missing_is_lost_exactly_if_it_was_not_late(
    steps: list[Step], lane: LaneSettings, data: st.DataObject
) -> None:
    done = skipping_pass(steps, lane, Random(data.draw(st.integers(0, 2**32))))
    if not done.features:
        return
    gone = data.draw(st.integers(0, len(done.features) - 1))
    one, behind = done.features[gone], done.features[gone + 1 :]
    prepared_us = next(
        (
            other.appended_us
            for other in behind
            if other.source.partition == one.source.partition
            and other.event.symbol == one.event.symbol
        ),
        done.asked_us,
    )
    late_us = START_US + one.source.offset * 1000 + math.floor(lane.deadline_ms) * 1000
    ledger = new_ledger(steps, lane, "at_least_once")
    verdict(ledger, [*done.features[:gone], *behind], done.asked_us)
    if prepared_us < late_us:
        assert lost(ledger) == {one.source[1:]}
        assert ledger.audit().skipped == done.num_skipped
    else:
        assert lost(ledger) == set()
        assert ledger.audit().skipped == done.num_skipped + 1


def test_lanes_skip_some_and_lose_some_in_these_tapes() -> None:
    """The two properties above look at something."""
    lane = LaneSettings(name="lane", rank=1, deadline_ms=10, reserved_share=0, expired="skip")
    counted = {"skipped": 0, "features": 0, "lost": 0}
    for seed in range(20):
        steps = tape(100, seed)
        done = skipping_pass(steps, lane, Random(seed))
        ledger = new_ledger(steps, lane, "at_least_once")
        verdict(ledger, done.features[1::2], done.asked_us)
        counted["skipped"] += done.num_skipped
        counted["features"] += len(done.features)
        counted["lost"] += len(lost(ledger))
    assert min(counted.values()) > 50, counted


def test_every_rule_fires_in_these_tapes() -> None:
    counted: dict[str, Any] = dict.fromkeys(("owed", "warm_up", "duplicates", "emptied"), 0)
    for seed in range(20):
        steps = tape(100, seed)
        lane = LaneSettings(name="lane", rank=1, deadline_ms=1, reserved_share=0)
        ledger = new_ledger(steps, lane, "at_least_once")
        verdict(ledger, [])
        audit = ledger.audit()
        for name in ("owed", "warm_up", "duplicates"):
            counted[name] += getattr(audit, name)
        symbols = {(step.partition, step.event.symbol) for step in steps}
        counted["emptied"] += audit.warm_up > 2 * len(symbols)
    assert min(counted.values()) > 10, counted


def _is_sampled(step: Step, lane: LaneSettings) -> bool:
    return zlib.crc32(step.event.event_id.encode()) % lane.stride == 0


def _fields(event: Event) -> tuple[Any, ...]:
    return (event.event_id, event.symbol, event.venue, event.event_time_us, QUOTE)
