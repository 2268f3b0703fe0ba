"""What a micro-batch holds: reserved shares, then rank; as many as are done in time."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.records import Record
from consumers.scheduler import LaneScheduler
from consumers.service_times import ServiceTimes, bucket_of
from schemas.lanes import DEFAULT_LANES, LaneSettings

NUM_PARTITIONS = 3
NOW_US = 1_700_000_000_000_000


def lane(
    name: str, rank: int, share: float, *, deadline_ms: float = 1000, max_batch: int | None = None
) -> LaneSettings:
    return LaneSettings(
        name=name, rank=rank, reserved_share=share, deadline_ms=deadline_ms, max_batch=max_batch
    )


DEFAULTS = [LaneSettings(name=name, **values) for name, values in DEFAULT_LANES.items()]


def records(
    lane: str, num_records: int, first_offset: int = 0, appended_us: int = NOW_US
) -> list[Record]:
    return [
        Record(lane, (f"t.{lane}", offset % NUM_PARTITIONS), offset, None, b"", (), appended_us)
        for offset in range(first_offset, first_offset + num_records)
    ]


def make_scheduler(
    lanes: Sequence[LaneSettings], *, max_batch: int = 64, seconds: dict[int, float] | None = None
) -> LaneScheduler:
    """With a model that takes no time, unless ``seconds`` by bucket say otherwise."""
    service_times = ServiceTimes()
    service_times.expect(seconds or {})
    return LaneScheduler(lanes, service_times, max_batch=max_batch, max_service_share=0.2)


def fill(scheduler: LaneScheduler, lanes: Iterable[LaneSettings], num_records: int) -> None:
    for one in lanes:
        scheduler.put(one.name, records(one.name, num_records - scheduler.num_queued(one.name)))


@st.composite
def lane_sets(draw: st.DrawFn) -> list[LaneSettings]:
    """One to six lanes in any order; their shares add up to 1 at most."""
    parts = draw(st.lists(st.integers(0, 100), min_size=1, max_size=6))
    spare = draw(st.integers(0, 100))
    whole = max(sum(parts) + spare, 1)
    lanes = [lane(f"lane-{rank}", rank, part / whole) for rank, part in enumerate(parts, 1)]
    return draw(st.permutations(lanes))


@given(lanes=lane_sets(), max_batch=st.integers(1, 60), data=st.data())
def test_batch_is_full_and_unused_shares_go_by_rank(
    lanes: list[LaneSettings], max_batch: int, data: st.DataObject
) -> None:
    scheduler = make_scheduler(lanes, max_batch=max_batch)
    waiting = {one.name: data.draw(st.integers(0, 80), label=one.name) for one in lanes}
    for name, num in waiting.items():
        scheduler.put(name, records(name, num))
    taken = Counter(one.lane for one in scheduler.take(NOW_US))

    by_rank = sorted(lanes, key=lambda one: one.rank)
    # The first micro-batch's credit: a whole record where a share comes to one, else none yet.
    reserved = {one.name: int(one.reserved_share * max_batch) for one in lanes}
    assert taken.total() == min(max_batch, sum(waiting.values())), "work-conserving"
    for one in lanes:
        assert taken[one.name] >= min(waiting[one.name], reserved[one.name])
    for index, one in enumerate(by_rank):
        if taken[one.name] > reserved[one.name] + 1:  # it borrows: those before have what they want
            assert all(taken[first.name] == waiting[first.name] for first in by_rank[:index])
    for name, num in waiting.items():
        assert scheduler.num_queued(name) == num - taken[name]


@given(lanes=lane_sets(), data=st.data())
def test_nothing_is_lost_and_no_lane_overtakes_itself(
    lanes: list[LaneSettings], data: st.DataObject
) -> None:
    scheduler = make_scheduler(lanes, max_batch=data.draw(st.integers(1, 30)))
    names = [one.name for one in lanes]
    num_put: Counter[str] = Counter()
    taken: dict[str, list[Record]] = {name: [] for name in names}

    def take() -> None:
        for record in scheduler.take(NOW_US):
            taken[record.lane].append(record)

    for _ in range(data.draw(st.integers(0, 15))):
        if data.draw(st.booleans()):
            name = data.draw(st.sampled_from(names))
            num = data.draw(st.integers(0, 20))
            scheduler.put(name, records(name, num, num_put[name]))
            num_put[name] += num
        else:
            scheduler.restrain(
                data.draw(st.integers(0, 5)), data.draw(st.sets(st.sampled_from(names)))
            )
            take()
        assert len(scheduler) == num_put.total() - sum(map(len, taken.values()))
        assert scheduler.num_taken() == {name: len(taken[name]) for name in names}
    while len(scheduler):
        before = len(scheduler)
        take()
        assert len(scheduler) < before, "never idle while something waits, held or not"
    assert taken == {name: records(name, num_put[name]) for name in names}


@given(
    parts=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    spare=st.integers(0, 100),
    max_batch=st.integers(1, 64),
    seed=st.integers(0, 2**32),
)
def test_no_lane_starves(parts: list[int], spare: int, max_batch: int, seed: int) -> None:
    """Random arrivals, any lane held or not: every record leaves within the documented bound."""
    random = Random(seed)
    whole = sum(parts) + spare
    lanes = [lane(f"lane-{rank}", rank, part / whole) for rank, part in enumerate(parts, 1)]
    assert_nobody_starves(lanes, max_batch, lambda: random.randint(0, 2 * max_batch), random)


@pytest.mark.parametrize("max_batch", [1, 4, 16])
def test_no_default_lane_starves_when_all_are_saturated(max_batch: int) -> None:
    assert_nobody_starves(DEFAULTS, max_batch, lambda: 2 * max_batch, None)


def assert_nobody_starves(
    lanes: Sequence[LaneSettings],
    max_batch: int,
    num_arriving: Callable[[], int],
    random: Random | None,
) -> None:
    scheduler = make_scheduler(lanes, max_batch=max_batch)
    due: dict[str, deque[float]] = {one.name: deque() for one in lanes}
    num_taken = 0
    for _ in range(100):
        for one in lanes:
            arriving, waiting = num_arriving(), scheduler.num_queued(one.name)
            scheduler.put(one.name, records(one.name, arriving))
            for place in range(waiting, waiting + arriving):
                within = (place + 2 + max_batch + len(lanes) ** 2) / one.reserved_share
                due[one.name].append(num_taken + within + max_batch)
        if random:
            held = [one.name for one in lanes if random.random() < 0.3]
            scheduler.restrain(random.randint(0, 4), held)
        for record in scheduler.take(NOW_US):
            num_taken += 1
            assert num_taken <= due[record.lane].popleft()
        assert all(not queue or num_taken <= queue[0] for queue in due.values())


@pytest.mark.parametrize("max_batch", [1, 4, 7, 16, 256])
def test_saturated_lanes_get_their_shares_whatever_the_batch_size(max_batch: int) -> None:
    """Even a share of 3 % in micro-batches of 4, of which it never is a whole record."""
    scheduler = make_scheduler(DEFAULTS, max_batch=max_batch)
    while sum(scheduler.num_taken().values()) < 20_000:
        fill(scheduler, DEFAULTS, 2 * max_batch)
        scheduler.take(NOW_US)
    total = sum(scheduler.num_taken().values())
    for one in DEFAULTS:
        saved = one.reserved_share * max_batch + 1
        assert scheduler.num_taken()[one.name] == pytest.approx(
            one.reserved_share * total, abs=saved
        )


def test_saved_up_credit_lets_a_burst_within_its_rights_pass() -> None:
    """After a calm, a burst of the first rank as large as its share of max_batch goes at once."""
    first, second = lane("first", 1, 0.5), lane("second", 2, 0.5)
    scheduler = make_scheduler([first, second], max_batch=16)
    scheduler.restrain(2, ())  # micro-batches of 4
    for _ in range(8):
        fill(scheduler, [second], 8)
        scheduler.take(NOW_US)
    scheduler.put("first", records("first", 8))
    fill(scheduler, [second], 8)
    assert [one.lane for _ in range(2) for one in scheduler.take(NOW_US)] == ["first"] * 8


def test_held_lane_gets_its_share_and_not_a_record_more() -> None:
    first, second = lane("first", 1, 0.5), lane("second", 2, 0.25)
    scheduler = make_scheduler([first, second], max_batch=8)
    scheduler.restrain(0, ["second"])
    scheduler.put("second", records("second", 100))
    assert [len(scheduler.take(NOW_US)) for _ in range(3)] == [2, 2, 2]
    scheduler.restrain(0, ())
    assert len(scheduler.take(NOW_US)) == 8


def test_lane_limit_bounds_its_part_of_a_batch() -> None:
    lanes = [lane("first", 1, 0.5, max_batch=3), lane("second", 2, 0.5)]
    scheduler = make_scheduler(lanes, max_batch=16)
    fill(scheduler, lanes, 50)
    assert Counter(one.lane for one in scheduler.take(NOW_US)) == {"first": 3, "second": 13}


PER_WINDOW = {bucket: bucket * 0.001 for bucket in (4, 8, 16, 32, 64)}  # 1 ms a window: a CPU
FLAT = dict.fromkeys((4, 8, 16, 32, 64), 0.015)  # a GPU far away


@pytest.mark.parametrize(
    ("deadline_ms", "seconds", "expected"),
    [
        (1000, PER_WINDOW, 64),  # 200 ms are allowed
        (100, PER_WINDOW, 16),  # 20 ms
        (50, PER_WINDOW, 8),  # 10 ms
        (5, PER_WINDOW, 4),  # 1 ms: too short even for the smallest, which is taken all the same
        (50, FLAT, 64),  # larger costs no more: whoever waits may ride for free
        (50, {}, 64),  # nothing is known: try
    ],
)
def test_batch_holds_the_model_for_a_share_of_the_shortest_deadline(
    deadline_ms: float, seconds: dict[int, float], expected: int
) -> None:
    lanes = [lane("urgent", 1, 0.5, deadline_ms=deadline_ms), lane("patient", 2, 0.5)]
    scheduler = make_scheduler(lanes, seconds=seconds)
    scheduler.put("urgent", records("urgent", 2))
    fill(scheduler, lanes[1:], 500)
    assert scheduler.limit(NOW_US) == expected
    assert len(scheduler.take(NOW_US)) == expected


def test_sleeping_lane_shortens_no_batch() -> None:
    lanes = [lane("urgent", 1, 0.5, deadline_ms=50), lane("patient", 2, 0.5)]
    scheduler = make_scheduler(lanes, seconds=PER_WINDOW)
    scheduler.put("urgent", records("urgent", 1, appended_us=NOW_US))
    assert len(scheduler.take(NOW_US)) == 1
    fill(scheduler, lanes[1:], 500)
    assert scheduler.limit(NOW_US + 900_000) == 8, "it may come again"
    assert scheduler.limit(NOW_US + 1_100_000) == 64


@pytest.mark.parametrize(
    ("waited_ms", "expected"),
    [(0, 16), (90, 8), (95, 4), (97, 16)],  # 3 ms are too few for any batch: it is lost
)
def test_others_ride_no_further_than_the_tightest_deadline_aboard(
    waited_ms: int, expected: int
) -> None:
    lanes = [lane("urgent", 1, 0.5, deadline_ms=100), lane("patient", 2, 0.5)]
    scheduler = make_scheduler(lanes, seconds=PER_WINDOW)
    scheduler.put("urgent", records("urgent", 3, appended_us=NOW_US - waited_ms * 1000))
    fill(scheduler, lanes[1:], 500)
    assert scheduler.limit(NOW_US) == expected


@pytest.mark.parametrize(("waiting", "expected"), [(8, 8), (9, 16), (30, 32), (200, 64)])
def test_all_that_waits_in_the_most_urgent_lane_goes_at_once(waiting: int, expected: int) -> None:
    lanes = [lane("urgent", 1, 0.5, deadline_ms=50), lane("patient", 2, 0.5)]
    scheduler = make_scheduler(lanes, seconds=PER_WINDOW)
    scheduler.put("urgent", records("urgent", waiting))
    fill(scheduler, lanes[1:], 500)
    assert scheduler.limit(NOW_US) == expected


@given(nums=st.lists(st.integers(0, 30), min_size=2, max_size=2), number=st.integers(0, 4))
def test_drop_forgets_one_partition_and_nothing_else(nums: list[int], number: int) -> None:
    lanes = [lane("a", 1, 0.5), lane("b", 2, 0.5)]
    scheduler = make_scheduler(lanes)
    put = [records(one.name, num) for one, num in zip(lanes, nums, strict=True)]
    for one, some in zip(lanes, put, strict=True):
        scheduler.put(one.name, some)
    leaving = ("t.a", number)
    kept = [[record for record in some if record.partition != leaving] for some in put]
    assert scheduler.drop(leaving) == len(put[0]) - len(kept[0])
    assert scheduler.drop(leaving) == 0
    assert len(scheduler) == sum(map(len, kept))
    assert scheduler.take(NOW_US) == kept[0] + kept[1]


def test_default_lanes_share_a_full_batch_as_documented() -> None:
    """All saturated: every lane has its share, realtime first in the batch."""
    scheduler = make_scheduler(DEFAULTS, max_batch=100)
    fill(scheduler, DEFAULTS, 200)
    batch = scheduler.take(NOW_US)
    shares = Counter(record.lane for record in batch)
    expected = {"realtime": 50, "market-data": 25, "batch": 15, "historical": 7, "background": 3}
    assert shares == expected
    assert [record.lane for record in batch] == sorted(
        (record.lane for record in batch), key=list(expected).index
    )
    assert make_scheduler(DEFAULTS).take(NOW_US) == []


def test_new_settings_hold_from_the_next_batch_on() -> None:
    first, second = lane("first", 1, 0.5), lane("second", 2, 0.5)
    scheduler = make_scheduler([first, second], max_batch=8)
    fill(scheduler, [first, second], 100)
    assert Counter(one.lane for one in scheduler.take(NOW_US)) == {"first": 4, "second": 4}
    lanes = [lane("first", 1, 0.25), lane("second", 2, 0.75)]
    scheduler.configure(lanes, max_batch=16, max_service_share=0.2)
    assert Counter(one.lane for one in scheduler.take(NOW_US)) == {"first": 4, "second": 12}


# What a micro-batch is expected to take.


def observe(service_times: ServiceTimes, num_windows: int, seconds: float, at_s: float) -> None:
    service_times.observe(num_windows, at_s, at_s + seconds)


@given(num_windows=st.integers(1, 10_000))
def test_bucket_is_the_power_of_two_that_holds_a_batch(num_windows: int) -> None:
    bucket = bucket_of(num_windows)
    assert bucket.bit_count() == 1
    assert bucket == 4 or bucket / 2 < num_windows <= bucket


@given(
    calls=st.lists(st.tuples(st.integers(1, 256), st.floats(0, 9)), max_size=60),
    measured=st.dictionaries(st.sampled_from([4, 8, 16, 32, 64]), st.floats(0, 10)),
)
def test_estimate_never_falls_with_the_batch(
    calls: list[tuple[int, float]], measured: dict[int, float]
) -> None:
    service_times = ServiceTimes()
    service_times.expect(measured)
    for number, (num_windows, seconds) in enumerate(calls):
        observe(service_times, num_windows, seconds, 10.0 * number)
    estimates = [service_times.predict(num_windows) for num_windows in range(1, 600, 3)]
    assert estimates == sorted(estimates)
    assert min(estimates) >= 0


def test_estimate_is_a_median_that_outliers_do_not_move() -> None:
    service_times = ServiceTimes()
    for number in range(31):
        observe(service_times, 8, 60.0 if number % 2 else 0.01, 100.0 * number)
    assert service_times.predict(8) == pytest.approx(0.01)


def test_unseen_bucket_is_as_measured_plus_the_way_there() -> None:
    service_times = ServiceTimes()
    service_times.expect({4: 0.003, 8: 0.005, 64: 0.030})
    assert service_times.predict(64) == pytest.approx(0.030)
    observe(service_times, 4, 0.008, 0.0)  # 5 ms more than the engine alone
    assert service_times.table() == pytest.approx({4: 0.008, 8: 0.010, 64: 0.035})


def test_what_was_not_seen_for_a_minute_is_forgotten() -> None:
    service_times = ServiceTimes()
    service_times.expect({4: 0.001, 64: 0.002})
    observe(service_times, 64, 5.0, 0.0)  # a stall
    assert service_times.predict(64) == pytest.approx(5.0)
    observe(service_times, 4, 0.001, 70.0)
    assert service_times.predict(64) == pytest.approx(0.002), "worth another try"


@pytest.mark.parametrize(("num_replicas", "expected"), [(1, 0.010), (2, 0.020)])
def test_wait_behind_earlier_calls_is_not_service(num_replicas: int, expected: float) -> None:
    """Two calls begin together. One replica works them off in turn, two side by side."""
    service_times = ServiceTimes(num_replicas)
    for number in range(20):
        begun_s = 0.040 * number
        service_times.observe(4, begun_s, begun_s + 0.010)
        service_times.observe(8, begun_s, begun_s + 0.020)
    assert service_times.predict(8) == pytest.approx(expected)
