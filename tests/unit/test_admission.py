"""When a free slot is filled: so that the micro-batch is ready just as the model is."""

import pytest

from consumers.admission import Admission
from consumers.service_times import ServiceTimes

SERVICE_S = {4: 0.010, 8: 0.020}


def admission(num_replicas: int = 1, *, prepare_s: float = 0.0) -> Admission:
    service_times = ServiceTimes(num_replicas)
    service_times.expect(SERVICE_S)
    found = Admission(service_times, num_replicas)
    if prepare_s:
        found.prepared(4, 0.0, prepare_s)
    return found


def test_a_free_model_is_never_waited_for() -> None:
    assert admission().wait_s(4, 1.0) == 0
    two = admission(num_replicas=2)
    two.begin(4, 1.0)
    assert two.wait_s(4, 1.0) == 0, "the second replica is free"


def test_a_busy_model_is_waited_for_until_it_is_nearly_free() -> None:
    one = admission(prepare_s=0.002)
    one.begin(8, 1.0)
    assert one.wait_s(4, 1.0) == pytest.approx(0.020 - 1.5 * 0.002)
    assert one.wait_s(4, 1.010) == pytest.approx(0.010 - 1.5 * 0.002)
    assert one.wait_s(4, 1.019) == 0, "preparing takes longer than the model still needs"


def test_a_call_that_takes_longer_than_expected_holds_nothing_up() -> None:
    one = admission()
    one.begin(4, 1.0)
    assert one.wait_s(4, 9.0) == 0


def test_micro_batches_do_not_follow_each_other_too_soon() -> None:
    """Counted from when the last was begun, whatever became of it; the first waits for nobody."""
    one = Admission(ServiceTimes(), interval_s=0.005)
    assert one.too_soon_s(1.0) == 0
    one.prepared(4, 1.0, 1.002)
    assert one.too_soon_s(1.002) == pytest.approx(0.003)
    assert one.too_soon_s(1.005) == pytest.approx(0)
    assert one.too_soon_s(9.0) == 0
    one.prepared(4, 9.0, 9.001)
    assert one.too_soon_s(9.001) == pytest.approx(0.004)


def test_without_an_interval_none_is_too_soon() -> None:
    one = admission(prepare_s=0.002)
    assert one.too_soon_s(0.0) == 0


def test_calls_queue_behind_each_other() -> None:
    one = admission()
    first = one.begin(4, 1.0)
    one.begin(8, 1.0)
    assert one.wait_s(4, 1.0) == pytest.approx(0.030)
    one.end(first, 1.005)  # sooner than expected: the second begins now
    assert one.wait_s(4, 1.005) == pytest.approx(0.020)


def test_with_replicas_the_first_to_be_free_counts() -> None:
    two = admission(num_replicas=2)
    two.begin(8, 1.0)
    quick = two.begin(4, 1.0)
    assert two.wait_s(4, 1.0) == pytest.approx(0.010)
    two.begin(4, 1.0)  # behind the quick one
    assert two.wait_s(4, 1.0) == pytest.approx(0.020)
    two.end(quick, 1.010)
    assert two.wait_s(4, 1.010) == pytest.approx(0.010)


def test_a_failed_call_is_forgotten() -> None:
    one = admission()
    one.end(one.begin(8, 1.0), 1.001)
    assert one.wait_s(4, 1.001) == 0


def test_more_replicas_leave_more_room_and_fewer_less() -> None:
    shared = admission()
    first, second = shared.begin(4, 1.0), shared.begin(8, 1.0)
    assert shared.wait_s(4, 1.0) == pytest.approx(0.030)
    shared.share(3)
    assert shared.wait_s(4, 1.0) == 0
    shared.share(1)
    assert shared.wait_s(4, 1.0) > 0
    shared.end(first, 1.010)
    shared.end(second, 1.030)
    assert shared.wait_s(4, 1.030) == 0
