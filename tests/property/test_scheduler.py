"""What a micro-batch holds: reserved shares, then rank; nothing lost, nothing overtaken."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from consumers.records import Record
from consumers.scheduler import LaneScheduler
from schemas.settings import DEFAULT_LANES, LaneSettings

NUM_PARTITIONS = 3


def lane(name: str, rank: int, share: float) -> LaneSettings:
    return LaneSettings(name=name, rank=rank, reserved_share=share, deadline_ms=1)


def records(lane: str, num_records: int, first_offset: int = 0) -> list[Record]:
    return [
        Record(lane, (f"t.{lane}", offset % NUM_PARTITIONS), offset, None, b"", (), 0)
        for offset in range(first_offset, first_offset + num_records)
    ]


@st.composite
def lane_sets(draw: st.DrawFn) -> list[LaneSettings]:
    """One to six lanes in any order; their shares add up to 1 at most."""
    parts = draw(st.lists(st.integers(0, 100), min_size=1, max_size=6))
    spare = draw(st.integers(0, 100))
    whole = max(sum(parts) + spare, 1)
    lanes = [lane(f"lane-{rank}", rank, part / whole) for rank, part in enumerate(parts, 1)]
    return draw(st.permutations(lanes))


@given(lanes=lane_sets(), max_records=st.integers(1, 60), data=st.data())
def test_batch_is_filled_by_share_then_rank(
    lanes: list[LaneSettings], max_records: int, data: st.DataObject
) -> None:
    scheduler = LaneScheduler(lanes)
    waiting = {one.name: data.draw(st.integers(0, 80), label=one.name) for one in lanes}
    for name, num in waiting.items():
        scheduler.put(name, records(name, num))
    taken = Counter(one.lane for one in scheduler.take(max_records))

    by_rank = sorted(lanes, key=lambda one: one.rank)
    reserved = {one.name: int(one.reserved_share * max_records) for one in lanes}
    assert taken.total() == min(max_records, sum(waiting.values())), "work-conserving"
    for one in lanes:
        assert taken[one.name] >= min(waiting[one.name], reserved[one.name])
    for index, one in enumerate(by_rank):
        if taken[one.name] > reserved[one.name]:  # a free rider: all before it have what they want
            assert all(taken[first.name] == waiting[first.name] for first in by_rank[:index])
    for name, num in waiting.items():
        assert scheduler.num_queued(name) == num - taken[name]


@given(lanes=lane_sets(), data=st.data())
def test_nothing_is_lost_and_no_lane_overtakes_itself(
    lanes: list[LaneSettings], data: st.DataObject
) -> None:
    scheduler = LaneScheduler(lanes)
    names = [one.name for one in lanes]
    num_put: Counter[str] = Counter()
    taken: dict[str, list[Record]] = {name: [] for name in names}

    def take(max_records: int) -> None:
        batch = scheduler.take(max_records)
        assert len(batch) <= max_records
        for record in batch:
            taken[record.lane].append(record)

    for _ in range(data.draw(st.integers(0, 15))):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(names))
            num = data.draw(st.integers(0, 20))
            scheduler.put(name, records(name, num, num_put[name]))
            num_put[name] += num
        else:
            take(data.draw(st.integers(1, 30)))
        assert len(scheduler) == num_put.total() - sum(map(len, taken.values()))
    while len(scheduler):
        take(7)
    assert taken == {name: records(name, num_put[name]) for name in names}


@given(nums=st.lists(st.integers(0, 30), min_size=2, max_size=2), number=st.integers(0, 4))
def test_drop_forgets_one_partition_and_nothing_else(nums: list[int], number: int) -> None:
    lanes = [lane("a", 1, 0.5), lane("b", 2, 0.5)]
    scheduler = LaneScheduler(lanes)
    put = [records(one.name, num) for one, num in zip(lanes, nums, strict=True)]
    for one, some in zip(lanes, put, strict=True):
        scheduler.put(one.name, some)
    leaving = ("t.a", number)
    kept = [[record for record in some if record.partition != leaving] for some in put]
    assert scheduler.drop(leaving) == len(put[0]) - len(kept[0])
    assert scheduler.drop(leaving) == 0
    assert len(scheduler) == sum(map(len, kept))
    assert scheduler.take(100) == kept[0] + kept[1]


def test_default_lanes_share_a_full_batch_as_documented() -> None:
    """All saturated: every lane has its share, realtime first in the batch."""
    lanes = [LaneSettings(name=name, **values) for name, values in DEFAULT_LANES.items()]
    scheduler = LaneScheduler(lanes)
    for one in lanes:
        scheduler.put(one.name, records(one.name, 200))
    batch = scheduler.take(100)
    shares = Counter(record.lane for record in batch)
    expected = {"realtime": 50, "market-data": 25, "batch": 15, "historical": 7, "background": 3}
    assert shares == expected
    assert [record.lane for record in batch] == sorted(
        (record.lane for record in batch), key=list(expected).index
    )
    assert LaneScheduler(lanes).take(100) == []
