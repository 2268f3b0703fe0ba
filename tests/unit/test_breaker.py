"""When dead letters are an outage."""

import pytest

from consumers.breaker import DeadLetterBreaker
from schemas.errors import DeadLetterFlood


def breaker(max_ratio: float = 1.0, max_consecutive: int = 10_000) -> DeadLetterBreaker:
    return DeadLetterBreaker("realtime", max_ratio=max_ratio, max_consecutive=max_consecutive)


def test_letters_in_a_row_are_counted_over_calls() -> None:
    lane = breaker(max_consecutive=5)
    lane.observe([True] * 3)
    lane.observe([True] * 2)
    with pytest.raises(DeadLetterFlood, match=r"lane realtime: more than 5 .*dlq_max_consecutive"):
        lane.observe([True])


def test_a_good_record_ends_a_row() -> None:
    lane = breaker(max_consecutive=5)
    for _ in range(10):
        lane.observe([True] * 5 + [False])


def test_the_ratio_counts_from_a_thousand_records_on() -> None:
    lane = breaker(max_ratio=0.2)
    lane.observe([True, False] * 499)
    with pytest.raises(DeadLetterFlood, match=r"50% of the last 1,000 records.*dlq_max_ratio"):
        lane.observe([True, False])


def test_the_ratio_forgets_what_is_long_past() -> None:
    lane = breaker(max_ratio=0.2)
    lane.observe([True] * 150 + [False] * 850)
    for _ in range(10):
        lane.observe([False] * 100)
    lane.observe([True] * 190 + [False] * 10)  # 190 of the last 1,100 or so
    with pytest.raises(DeadLetterFlood):
        lane.observe([True] * 100)


def test_a_ratio_of_one_allows_everything() -> None:
    lane = breaker(max_ratio=1.0)
    lane.observe([True] * 5_000)
