"""Windows are a function of the records alone: not of batches, restarts or other partitions.

The stores here are tiny (4 steps, 3 symbols, 8 idle records, a rate over 5 events), so that every
rule that empties a window fires in streams of a few dozen events.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
from columns import columns_of
from hypothesis import given, settings
from hypothesis import strategies as st

from consumers.channels import Market50
from consumers.records import Partition
from consumers.windows import WindowStore
from schemas.messages import (
    MAX_LONG,
    MAX_PRICE,
    MAX_SIZE,
    MIN_PRICE,
    Bar,
    Book,
    Flags,
    MarketEvent,
    Payload,
    Quote,
    Sample,
    Trade,
    check_event,
)
from schemas.settings import WindowSettings

PARTITIONS: tuple[Partition, ...] = (("lane", 0), ("lane", 1))
SMALL = WindowSettings(num_steps=4, max_gap_s=10, max_idle_records=8, max_symbols=3)
START_US = 1_700_000_000_000_000
GAP_US = 10_000_000


class SmallMarket50(Market50):
    """``market50-v1`` with a shorter memory: rates lean on 5 events, not on 20."""

    recent = 5


class Step(NamedTuple):
    """One record of a stream, and what its lane asks for."""

    partition: Partition
    offset: int
    event: MarketEvent
    wanted: bool
    min_interval_us: int


class Result(NamedTuple):
    """What became of one event; ``window`` as bytes, so that equal means equal bits."""

    full: bool
    flags: int
    window: bytes | None


# Streams.

PRICES = st.one_of(
    st.floats(MIN_PRICE, MAX_PRICE),
    st.floats(99, 101),
    st.sampled_from([MIN_PRICE, MAX_PRICE, 100.0]),
)
SIZES = st.one_of(st.floats(0, MAX_SIZE), st.floats(0, 10), st.sampled_from([0.0, MAX_SIZE]))


@st.composite
def sides(draw: st.DrawFn, *, rising: bool) -> list[tuple[float, float]]:
    prices = draw(st.lists(PRICES, max_size=10, unique=True))
    return [(price, draw(SIZES)) for price in sorted(prices, reverse=not rising)]


def payloads(channels: int = 50) -> st.SearchStrategy[Payload]:
    values = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1)
    return st.one_of(
        st.builds(Trade, PRICES, SIZES, st.sampled_from(["unknown", "buy", "sell"])),
        st.builds(Quote, PRICES, SIZES, PRICES, SIZES),
        st.builds(Book.from_levels, sides(rising=False), sides(rising=True)),
        st.builds(Bar, PRICES, PRICES, PRICES, PRICES, SIZES, st.integers(1, MAX_LONG)),
        values.map(lambda some: Sample.from_values(np.resize(some, channels))),
    )


# Streams come from a seed: drawn step by step, hypothesis would need most of the time for drawing.
# It still shrinks their length.
KINDS = (Trade, Quote, Book, Bar, Sample)
POOL_ROUNDS = 13


def pool(random: Random) -> list[Payload]:
    """Payloads of every kind in turn, realistic and extreme ones, two-sided and one-sided."""

    def price() -> float:
        return random.choice([random.uniform(99, 101)] * 3 + [10 ** random.uniform(-11, 14)])

    def size() -> float:
        return random.choice([0.0, random.expovariate(0.2), 10 ** random.uniform(0, 17)])

    def side(*, rising: bool) -> list[tuple[float, float]]:
        prices = {price() for _ in range(random.randrange(11))}
        return [(one, size()) for one in sorted(prices, reverse=not rising)]

    def trade() -> Trade:
        return Trade(price(), size(), random.choice(["unknown", "buy", "sell"]))

    makers: list[Callable[[], Payload]] = [
        trade,
        lambda: Quote(price(), size(), price(), size()),
        lambda: Book.from_levels(side(rising=False), side(rising=True)),
        lambda: Bar(price(), price(), price(), price(), size(), 1),
        lambda: Sample.from_values([random.gauss() for _ in range(50)]),
    ]
    return [make() for _ in range(POOL_ROUNDS) for make in makers]


POOL = pool(Random(2))


def mixed(num_payloads: int, random: Random) -> list[Payload]:
    """All kinds, some kinds rare, so that rows lean on what is long past."""
    odds = [random.choice([0, 0, 1, 6]) for _ in KINDS]
    return random.choices(POOL, odds * POOL_ROUNDS if any(odds) else None, k=num_payloads)


def in_phases(num_payloads: int, random: Random) -> list[Payload]:
    """One kind at a time, so that what a row leans on changes all at once."""
    payloads: list[Payload] = []
    while len(payloads) < num_payloads:
        kind = random.randrange(len(KINDS))
        payloads += random.choices(POOL[kind :: len(KINDS)], k=random.randint(1, 8))
    return payloads[:num_payloads]


def stream(num_events: int, seed: int) -> list[Step]:
    """Records of two partitions, with whatever a tape may do.

    Up to five symbols for three places, bursts that leave others idle; offsets with gaps; event
    time that stands still, jumps or goes back; sequence numbers missing, repeated and skipped;
    records that are not wanted, a lane with a least interval.
    """
    random = Random(seed)
    interval_us = random.choice([0, 0, 300_000, 2_000_000])
    jump = random.choice([0.0, 0.02, 0.1])
    payloads = random.choice([mixed, mixed, in_phases])(num_events, random)
    symbols = "ABCDE"[: random.choice([1, 1, 2, 4, 5])]
    loyalty = random.choice([0.3, 0.6, 0.8])
    in_second = random.choice([0.0, 0.2])
    times_us: dict[tuple[Partition, str], int] = {}
    sequences: dict[tuple[Partition, str], int] = {}
    offsets = dict.fromkeys(PARTITIONS, random.randrange(4))
    symbol, steps = "A", []
    for number, payload in enumerate(payloads):
        partition = PARTITIONS[random.random() < in_second]
        if random.random() > loyalty:
            symbol = random.choice(symbols)
        key = (partition, symbol)
        offsets[partition] += random.choice([1, 1, 1, 1, 3])
        elapsed_us = random.choice([0, 1, 150_000, 1_000_000, -400_000])
        if random.random() < jump:
            elapsed_us = random.choice([GAP_US, GAP_US + 1])
        times_us[key] = times_us.get(key, START_US) + elapsed_us
        sequences[key] = sequences.get(key, 1000) + random.choice([1, 1, 1, 0, 2, -2])
        sequence = random.choice([sequences[key], sequences[key], None])
        event = MarketEvent(f"id-{number}", symbol, "V", times_us[key], payload, sequence)
        wanted = random.random() < 0.9
        steps.append(Step(partition, offsets[partition], event, wanted, interval_us))
    return steps


SEEDS = st.integers(0, 2**32)
STREAMS = st.builds(stream, st.integers(1, 150), SEEDS)


@st.composite
def cuts(draw: st.DrawFn, num_events: int) -> list[int]:
    """Where to cut so many events into batches."""
    inner = draw(st.sets(st.integers(0, num_events), max_size=12))
    return sorted({0, num_events} | inner)


# Feeding a store.


def new_store(limits: WindowSettings = SMALL) -> WindowStore:
    store = WindowStore(SmallMarket50(), limits)
    for partition in PARTITIONS:
        store.assign(partition)
    return store


def feed(store: WindowStore, steps: Sequence[Step]) -> list[Result]:
    """Appends a batch; one result an event."""
    appended = store.append(
        [step.partition for step in steps],
        [step.offset for step in steps],
        columns_of([step.event for step in steps]),
        np.array([step.wanted for step in steps], bool),
        np.array([step.min_interval_us for step in steps], np.int64),
    )
    assert len(appended.windows) == appended.given.sum()
    assert np.isfinite(appended.windows).all()
    windows = iter(appended.windows)
    return [
        Result(bool(full), int(flags), next(windows).tobytes() if given else None)
        for full, given, flags in zip(appended.full, appended.given, appended.flags, strict=True)
    ]


def feed_in_batches(store: WindowStore, steps: Sequence[Step], at: Sequence[int]) -> list[Result]:
    return [result for start, end in pairwise(at) for result in feed(store, steps[start:end])]


# The properties.


@given(steps=STREAMS, data=st.data())
@settings(max_examples=80, deadline=None)
def test_batches_do_not_matter(steps: list[Step], data: st.DataObject) -> None:
    """Windows, flags, fullness and the replay offset: the same bits, however events were cut."""
    one_by_one, batched = new_store(), new_store()
    expected = feed_in_batches(one_by_one, steps, range(len(steps) + 1))
    assert feed_in_batches(batched, steps, data.draw(cuts(len(steps)))) == expected
    for partition in PARTITIONS:
        position = _position(steps, partition)
        replay_from = batched.replay_offset(partition, position)
        assert replay_from == one_by_one.replay_offset(partition, position)
    assert batched.statistics() == one_by_one.statistics()


@given(
    steps=st.builds(stream, st.integers(1, 60), SEEDS),
    first=st.integers(0, 7),
    every=st.integers(2, 8),
)
@settings(max_examples=200, deadline=None)
def test_replay_rebuilds_the_windows_bit_for_bit(steps: list[Step], first: int, every: int) -> None:
    """THE invariant: a new store, fed from a checkpoint's replay offset on, gives every event at
    or after the checkpoint what the old one gave it. So it does after any later commit, too."""
    at = sorted({0, len(steps), *range(min(first, len(steps)), len(steps), every)})
    old = new_store()
    expected: list[Result] = []
    replay_offsets = []
    for start, end in pairwise([*at, len(steps)]):
        replay_offsets.append(
            {one: old.replay_offset(one, _position(steps[:start], one)) for one in PARTITIONS}
        )
        expected += feed(old, steps[start:end])
    for start, replay_from in zip(at, replay_offsets, strict=True):
        replayed = [step for step in steps if step.offset >= replay_from[step.partition]]
        results = feed(new_store(), replayed)
        by_id = {step.event.event_id: one for step, one in zip(replayed, results, strict=True)}
        for step, result in zip(steps[start:], expected[start:], strict=True):
            assert by_id[step.event.event_id] == result, (start, replay_from, step)


@given(STREAMS)
@settings(max_examples=40, deadline=None)
def test_replay_offset_never_falls_and_never_passes_the_position(steps: list[Step]) -> None:
    store = new_store()
    newest = dict.fromkeys(PARTITIONS, -1)
    for step in steps:
        feed(store, [step])
        replay_from = store.replay_offset(step.partition, step.offset + 1)
        assert newest[step.partition] <= replay_from <= step.offset + 1
        newest[step.partition] = replay_from
    for partition in PARTITIONS:
        position = _position(steps, partition) + SMALL.max_idle_records
        assert store.replay_offset(partition, position) == position, "all of it is void"


@given(steps=STREAMS, data=st.data())
@settings(max_examples=80, deadline=None)
def test_windows_are_those_of_a_naive_model(steps: list[Step], data: st.DataObject) -> None:
    """One event after another, a deque a symbol, every rule spelled out."""
    model = NaiveWindows(SMALL)
    results = feed_in_batches(new_store(), steps, data.draw(cuts(len(steps))))
    for step, result in zip(steps, results, strict=True):
        assert result == model.append(step), step


@given(steps=STREAMS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_partitions_do_not_know_of_each_other(steps: list[Step], data: st.DataObject) -> None:
    together = feed_in_batches(new_store(), steps, data.draw(cuts(len(steps))))
    for partition in PARTITIONS:
        mine = [step for step in steps if step.partition == partition]
        expected = [
            result
            for step, result in zip(steps, together, strict=True)
            if step.partition == partition
        ]
        assert feed(new_store(), mine) == expected


@given(steps=STREAMS, data=st.data())
@settings(max_examples=40, deadline=None)
def test_partition_assigned_again_begins_anew(steps: list[Step], data: st.DataObject) -> None:
    """What a revoked partition leaves in the arrays is seen by nobody."""
    middle = data.draw(st.integers(0, len(steps)))
    used = new_store()
    feed(used, steps[:middle])
    for partition in PARTITIONS:
        used.revoke(partition)
        used.assign(partition)
    rest = steps[middle:]
    assert feed(used, rest) == feed(new_store(), rest)


@given(st.lists(payloads(), min_size=1, max_size=12), st.data())
@settings(max_examples=120, deadline=None)
def test_rows_are_finite_whatever_the_contract_allows(
    sequence: list[Payload], data: st.DataObject
) -> None:
    times_us = st.one_of(st.integers(1, MAX_LONG), st.just(1), st.just(MAX_LONG))
    events = [
        MarketEvent("id", "S", "V", data.draw(times_us), payload, data.draw(SEQUENCES))
        for payload in sequence
    ]
    for one in events:
        check_event(one)
    limits = WindowSettings(num_steps=1, max_gap_s=MAX_LONG / 1e6)
    steps = [Step(PARTITIONS[0], at, one, True, 0) for at, one in enumerate(events)]
    results = feed(new_store(limits), steps)
    rows = np.stack([np.frombuffer(one.window or b"", np.float32) for one in results])
    assert rows.shape == (len(events), 50)
    assert np.isfinite(rows).all()


SEQUENCES = st.one_of(st.none(), st.integers(0, MAX_LONG), st.just(0), st.just(MAX_LONG))


def test_memory_is_bounded() -> None:
    """Ten thousand symbols through three places: no more slots, and all are used again."""
    store = new_store()
    sizes = set()
    for start in range(0, 10_000, 50):
        feed(
            store,
            [
                Step(PARTITIONS[0], at, MarketEvent("i", f"S{at}", "V", at + 1, POOL[0]), True, 0)
                for at in range(start, start + 50)
            ],
        )
        sizes.add(store.statistics().allocated_bytes)
    assert len(sizes) == 1
    statistics = store.statistics()
    assert statistics.num_symbols == SMALL.max_symbols
    assert statistics.evicted_total == 10_000 - SMALL.max_symbols


def test_every_rule_fires_in_these_streams() -> None:
    """The properties above say something only if gaps, idleness and eviction really happen."""
    fired: Counter[str] = Counter()
    for seed in range(15):
        model = NaiveWindows(SMALL)
        for step in stream(100, seed):
            result = model.append(step)
            fired[model.why] += 1
            fired["full"] += result.full
            fired["thinned"] += result.full and result.window is None and step.wanted
            fired["flagged"] += result.flags > 0
        fired["evicted"] += model.num_evicted
    rules = ("new", "gap", "idle", "evicted", "full", "thinned", "flagged")
    assert all(fired[rule] > 10 for rule in rules), fired


@pytest.mark.parametrize("newest", [0.0, 0.25, 0.999999, 1.0])
def test_least_interval_takes_the_first_event_of_each(newest: float) -> None:
    """Intervals are counted from the epoch, so that a replay takes the same events."""
    limits = WindowSettings(num_steps=1)
    times_us = [0.1, 0.4, 0.9, 1.2, 1.3, 3.0, 3.0 + newest]
    steps = [
        Step(
            PARTITIONS[0],
            at,
            MarketEvent("i", "S", "V", START_US + int(time_s * 1e6), POOL[0]),
            True,
            1_000_000,
        )
        for at, time_s in enumerate(times_us)
    ]
    given_out = [one.window is not None for one in feed(new_store(limits), steps)]
    assert given_out == [True, False, False, True, False, True, newest == 1.0]


def test_same_symbol_on_two_venues_has_two_windows() -> None:
    limits = WindowSettings(num_steps=2)
    steps = [
        Step(PARTITIONS[0], at, MarketEvent("i", "S", venue, START_US + at, POOL[at]), True, 0)
        for at, venue in enumerate(["one", "two", "one", "two"])
    ]
    assert [one.full for one in feed(new_store(limits), steps)] == [False, False, True, True]


# The model that the store is compared with.


@dataclass
class NaiveSymbol:
    """What the naive model keeps of one symbol."""

    state: Any
    newest: Step
    rows: deque[np.ndarray[Any, Any]]


class NaiveWindows:
    """The rules of docs/DESIGN.md, 3.3, one event at a time."""

    def __init__(self, limits: WindowSettings) -> None:
        self.why = ""
        self.num_evicted = 0
        self._limits = limits
        self._channels = SmallMarket50()
        self._symbols: dict[Partition, OrderedDict[tuple[str, str], NaiveSymbol]] = {
            partition: OrderedDict() for partition in PARTITIONS
        }

    def append(self, step: Step) -> Result:
        event, known = step.event, self._symbols[step.partition]
        key = (event.venue, event.symbol)
        symbol = known.pop(key, None)
        before = symbol.newest if symbol else None
        self.why = self._void(before, step)
        if symbol is None and len(known) == self._limits.max_symbols:
            known.popitem(last=False)
            self.num_evicted += 1
        if symbol is None or self.why:
            rows: deque[Any] = deque(maxlen=self._limits.num_steps)
            symbol = NaiveSymbol(self._channels.empty(), step, rows)
            before = None
        known[key] = symbol

        rows_, _ = self._channels.rows(
            columns_of([event]),
            np.array([step.offset]),
            np.array([0]),
            np.array([False]),
            symbol.state,
        )
        symbol.rows.append(rows_[0])
        symbol.newest = step
        full = len(symbol.rows) == self._limits.num_steps
        given = full and step.wanted and self._starts_interval(before, step)
        window = np.stack(symbol.rows, axis=1).tobytes() if given else None
        return Result(full, _flags(before, step), window)

    def _void(self, before: Step | None, step: Step) -> str:
        if before is None:
            return "new"
        elapsed_us = step.event.event_time_us - before.event.event_time_us
        if elapsed_us > self._limits.max_gap_s * 1e6:
            return "gap"
        return "idle" if step.offset - before.offset > self._limits.max_idle_records else ""

    @staticmethod
    def _starts_interval(before: Step | None, step: Step) -> bool:
        if before is None or not step.min_interval_us:
            return True
        of = [one.event.event_time_us // step.min_interval_us for one in (before, step)]
        return of[0] != of[1]


def _flags(before: Step | None, step: Step) -> int:
    if before is None:
        return 0
    flags = Flags(0)
    old, new = before.event.sequence, step.event.sequence
    if old is not None and new is not None:
        if new > old + 1:
            flags |= Flags.GAP
        if new <= old:
            flags |= Flags.OUT_OF_ORDER
    if step.event.event_time_us < before.event.event_time_us:
        flags |= Flags.OUT_OF_ORDER
    return int(flags)


def _position(steps: Sequence[Step], partition: Partition) -> int:
    """The offset after the newest of a partition's records."""
    return max((step.offset + 1 for step in steps if step.partition == partition), default=0)
