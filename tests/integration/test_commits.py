"""What a lane's poller tells the broker of a partition that goes to another member."""

import asyncio
from collections.abc import Callable, Sequence

import pytest
from pipeline import LONG_S
from waiting import wait_until

from consumers.poller import LanePoller
from consumers.records import Assignment, CommitPoint, Partition, Record
from schemas.settings import Settings
from tapeline.lag import lane_lags
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
LANE = "realtime"
DONE, DONE_BEFORE, SAID_LAST = 5, 2, 1


class Owner:
    """Owns partitions; every one that goes was done up to ``DONE``, and a commit of less waits."""

    def __init__(
        self, settings: Settings, loop: asyncio.AbstractEventLoop, instance_id: str | None
    ) -> None:
        self.owned: set[Partition] = set()
        self.poller = LanePoller(settings.lane(LANE), settings, self, loop, instance_id)

    def put(self, lane: str, records: list[Record]) -> None:
        raise AssertionError("there is nothing to poll")

    def num_queued(self, lane: str) -> int:
        return 0

    def max_queued(self, lane: str) -> int:
        return 1

    def commit_failed(self, partitions: Sequence[Partition]) -> None:
        raise AssertionError(f"the broker refused a commit of {partitions}")

    async def assigned(self, assignments: Sequence[Assignment]) -> None:
        self.owned |= {one.partition for one in assignments}

    async def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> list[CommitPoint]:
        self.owned -= set(partitions)
        self.poller.commit([CommitPoint(one, DONE_BEFORE, 0) for one in partitions])
        return [CommitPoint(one, DONE, 0) for one in partitions]


@pytest.mark.parametrize(
    ("group_protocol", "names"),
    [("classic", (None, None)), ("classic", ("one", "two")), ("consumer", (None, None))],
    ids=["cooperative", "static", "consumer"],
)
async def test_a_commit_that_waits_does_not_follow_its_partition(
    make_settings: MakeSettings, group_protocol: str, names: tuple[str | None, str | None]
) -> None:
    """Sent after the last one, it would put the offset back, and nobody would put it forward."""
    settings = make_settings(worker={"group_protocol": group_protocol})
    await asyncio.to_thread(ensure_topics, settings)
    all_partitions = settings.kafka.num_partitions

    def committed() -> dict[int, int | None]:
        return {one.partition: one.committed for one in lane_lags(settings) if one.lane == LANE}

    async def until(predicate: Callable[[], object], what: str) -> None:
        await asyncio.to_thread(wait_until, predicate, LONG_S, what)

    first, second = (Owner(settings, asyncio.get_running_loop(), name) for name in names)
    try:
        first.poller.start()
        await until(lambda: len(first.owned) == all_partitions, "the first to own all")
        second.poller.start()
        await until(
            lambda: (
                second.owned and first.owned and len(first.owned | second.owned) == all_partitions
            ),
            "both to own some",
        )
        first.poller.commit([CommitPoint(one, SAID_LAST, 0) for one in first.owned])
        last = {number for _, number in first.owned}
        await until(
            lambda: all(committed()[number] == SAID_LAST for number in last), "what is said last"
        )
        gone = {number for _, number in second.owned}
        assert {committed()[number] for number in gone} == {DONE}
    finally:
        for one in (first, second):
            await one.poller.close()
