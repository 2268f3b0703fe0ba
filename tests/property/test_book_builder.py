"""The order book against a plain dict, whatever the venue sends and whatever gets lost."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tapeline.sources.orderbook import BookSide, Diff, Level, OrderBook

SIZES = st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.5])
BIDS = st.lists(st.tuples(st.integers(1, 30).map(float), SIZES), max_size=8)
ASKS = st.lists(st.tuples(st.integers(31, 60).map(float), SIZES), max_size=8)

Levels = dict[float, float]


@dataclass(frozen=True)
class Snapshot:
    """The venue's whole book at one update, or halfway through one."""

    update_id: int
    bids: list[Level]
    asks: list[Level]


def applied(levels: Levels, changes: list[Level]) -> Levels:
    after = levels | dict(changes)
    return {price: size for price, size in after.items() if size}


def best_bids(levels: Levels) -> list[Level]:
    return sorted(levels.items(), reverse=True)[:10]


def best_asks(levels: Levels) -> list[Level]:
    return sorted(levels.items())[:10]


@st.composite
def feeds(draw: st.DrawFn) -> tuple[list[Diff | Snapshot], dict[int, tuple[Levels, Levels]]]:
    """What arrives, in its order, with losses; and the venue's true book after each update id."""
    is_futures = draw(st.booleans())
    bids: Levels = {}
    asks: Levels = {}
    update_id = draw(st.integers(1, 1000))
    truth = {update_id: (bids, asks)}
    diffs: list[Diff] = []
    snapshots = [Snapshot(update_id, [], [])]
    for _ in range(draw(st.integers(1, 25))):
        first = update_id + 1 + (draw(st.integers(0, 3)) if is_futures else 0)
        last = first + draw(st.integers(0, 5))
        new_bids, new_asks = draw(BIDS), draw(ASKS)
        diffs.append(Diff(update_id if is_futures else first - 1, last, new_bids, new_asks))
        if last > first:
            halfway = draw(st.integers(0, len(new_bids)))
            half_bids = applied(bids, new_bids[:halfway])
            snapshots.append(Snapshot(first, [*half_bids.items()], [*asks.items()]))
        bids, asks, update_id = applied(bids, new_bids), applied(asks, new_asks), last
        truth[update_id] = (bids, asks)
        snapshots.append(Snapshot(update_id, [*bids.items()], [*asks.items()]))
    lost = draw(st.sets(st.integers(0, len(diffs) - 1), max_size=2))
    arrivals: list[Diff | Snapshot] = [d for i, d in enumerate(diffs) if i not in lost]
    for snapshot in draw(st.lists(st.sampled_from(snapshots), min_size=1, max_size=4)):
        arrivals.insert(draw(st.integers(0, len(arrivals))), snapshot)
    return arrivals, truth


@given(feed=feeds())
def test_a_live_book_is_the_venues_book(
    feed: tuple[list[Diff | Snapshot], dict[int, tuple[Levels, Levels]]],
) -> None:
    """Late, early and repeated snapshots, lost diffs: never a wrong book, only none."""
    arrivals, truth = feed
    book = OrderBook()
    num_diffs = 0
    for arrival in arrivals:
        if isinstance(arrival, Diff):
            num_diffs += 1
            gaps_before = book.statistics().gaps
            outcome = book.apply_diff(arrival)
            assert (outcome == "gap") == (book.statistics().gaps > gaps_before)
            assert book.is_live == (outcome in ("applied", "stale"))
        else:
            book.apply_snapshot(arrival.update_id, arrival.bids, arrival.asks)
        if book.is_live and book.update_id in truth:
            bids, asks = truth[book.update_id]
            assert book.bids() == best_bids(bids)
            assert book.asks() == best_asks(asks)
            assert book.top().bid_levels.tolist() == [list(level) for level in best_bids(bids)]
            assert book.top().ask_levels.tolist() == [list(level) for level in best_asks(asks)]
    counts = book.statistics()
    assert counts.applied + counts.stale + counts.buffered + counts.dropped == num_diffs


@given(feed=feeds())
def test_a_book_heals_with_a_snapshot_of_now(
    feed: tuple[list[Diff | Snapshot], dict[int, tuple[Levels, Levels]]],
) -> None:
    """Whatever happened before, the newest snapshot makes the book live and right."""
    arrivals, truth = feed
    book = OrderBook()
    for arrival in arrivals:
        if isinstance(arrival, Diff):
            book.apply_diff(arrival)
        else:
            book.apply_snapshot(arrival.update_id, arrival.bids, arrival.asks)
    newest = max(truth)
    bids, asks = truth[newest]
    book.apply_snapshot(newest, [*bids.items()], [*asks.items()])
    assert book.is_live
    assert book.update_id == newest
    assert (book.bids(), book.asks()) == (best_bids(bids), best_asks(asks))


@given(changes=st.lists(BIDS, max_size=20), max_levels=st.integers(1, 40))
def test_a_side_forgets_only_the_levels_farthest_from_the_best(
    changes: list[list[Level]], max_levels: int
) -> None:
    side = BookSide(rising=False, max_levels=max_levels)
    levels: Levels = {}
    for change in changes:
        side.update(change)
        levels = dict(sorted(applied(levels, change).items(), reverse=True)[:max_levels])
        assert side.best(max_levels) == [*levels.items()]
        assert len(side) == len(levels)
        assert side.total_size == sum(levels.values())
