"""The simulated market: the same for a seed, valid, and shaped like a market."""

import itertools
from collections import Counter, defaultdict
from random import Random

import msgspec
import pytest

from schemas.errors import ConfigError
from schemas.messages import Book, MarketEvent, Quote, Trade, check_event
from tapeline.simulator import _Market, simulate, symbol_names

START_US = 1_700_000_000_000_000
NUM_EVENTS = 20_000


def run(seed: int = 7, start_time_us: int = START_US, **limits: float) -> list[MarketEvent]:
    return list(
        simulate(symbols=symbol_names(4), seed=seed, start_time_us=start_time_us, **limits)  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def events() -> list[MarketEvent]:
    return run(num_events=NUM_EVENTS)


def test_the_same_seed_gives_the_same_bytes(events: list[MarketEvent]) -> None:
    encode = msgspec.msgpack.encode
    assert encode(run(num_events=2_000)) == encode(events[:2_000])
    other = run(seed=8, num_events=2_000)
    assert [event.payload for event in other] != [event.payload for event in events[:2_000]]
    assert [event.event_time_us for event in other] != [e.event_time_us for e in events[:2_000]]


def test_ids_are_unique_among_events_seeds_and_starts(events: list[MarketEvent]) -> None:
    others = [*run(seed=8, num_events=1_000), *run(start_time_us=START_US + 1, num_events=1_000)]
    assert len({event.event_id for event in [*events, *others]}) == NUM_EVENTS + 2_000


def test_every_event_keeps_the_contract(events: list[MarketEvent]) -> None:
    """Valid, in order, numbered without a hole; books uncrossed and never thin."""
    by_symbol = defaultdict(list)
    for event in events:
        check_event(event)
        by_symbol[event.symbol].append(event)
        match event.payload:
            case Book():
                bids, asks = event.payload.bid_levels, event.payload.ask_levels
                assert len(bids) == len(asks) == 10
                assert bids[0, 0] < asks[0, 0]
                assert min(bids[:, 1].min(), asks[:, 1].min()) > 0
            case Quote(bid_price, bid_size, ask_price, ask_size):
                assert bid_price < ask_price
                assert min(bid_size, ask_size) > 0
            case Trade(_, size, side):
                assert size > 0
                assert side in ("buy", "sell")
    assert set(by_symbol) == {"SIM01", "SIM02", "SIM03", "SIM04"}
    for tape in by_symbol.values():
        assert [event.sequence for event in tape] == [*range(1, len(tape) + 1)]
        pairs = itertools.pairwise(event.event_time_us for event in tape)
        assert all(earlier < later for earlier, later in pairs)
    assert all(a.event_time_us <= b.event_time_us for a, b in itertools.pairwise(events))


def test_a_side_that_everybody_takes_never_runs_dry() -> None:
    market = _Market(Random(1), tick_size=0.01)
    for _ in range(500):
        market._execute("buy")
    book = market._book()
    assert len(book.bid_levels) == len(book.ask_levels) == 10
    assert book.bid_levels[0, 0] < book.ask_levels[0, 0]


def test_the_mix_is_a_markets(events: list[MarketEvent]) -> None:
    kinds = Counter(type(event.payload) for event in events)
    assert 0.25 < kinds[Trade] / NUM_EVENTS < 0.35
    assert kinds[Quote] > 0.05 * NUM_EVENTS
    assert kinds[Book] > 0.4 * NUM_EVENTS
    sides = Counter(event.payload.side for event in events if isinstance(event.payload, Trade))
    assert 0.8 < sides["buy"] / sides["sell"] < 1.25
    per_symbol = Counter(event.symbol for event in events)
    assert [symbol for symbol, _ in per_symbol.most_common()] == symbol_names(4)
    assert min(per_symbol.values()) > NUM_EVENTS / 10


def test_the_rate_is_the_one_asked_for(events: list[MarketEvent]) -> None:
    elapsed_s = (events[-1].event_time_us - START_US) / 1e6
    assert 950 < NUM_EVENTS / elapsed_s < 1050


def test_duration_and_number_end_it_whichever_comes_first(events: list[MarketEvent]) -> None:
    shorter = run(duration_s=2.0, num_events=NUM_EVENTS)
    assert shorter == [event for event in events if event.event_time_us < START_US + 2_000_000]
    assert run(duration_s=2.0, num_events=3) == events[:3]
    assert run(num_events=0) == []


@pytest.mark.parametrize(
    ("change", "mend"),
    [
        ({"symbols": []}, "at least 1 symbol"),
        ({"symbols": ["A", "A"]}, "none of them twice"),
        ({"symbols": ["A" * 41]}, "1 to 40 characters"),
        ({"rate_hz": 0.0}, "rate_hz must be a positive number"),
        ({"tick_size": float("nan")}, "tick_size must be a positive number"),
        ({"start_time_us": 0}, "after 1970"),
        ({"num_events": -1}, "not be negative"),
        ({"duration_s": 0.0}, "positive number of seconds"),
    ],
)
def test_a_market_that_cannot_be_is_refused_at_the_call(
    change: dict[str, object], mend: str
) -> None:
    arguments: dict[str, object] = {"symbols": ["A"], "seed": 1, "start_time_us": START_US}
    with pytest.raises(ConfigError, match=mend):
        simulate(**(arguments | change))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 1 symbol"):
        symbol_names(0)
