"""How a lane's poller takes records from a real broker."""

import asyncio
from collections.abc import Callable, Sequence

from confluent_kafka import Producer
from pipeline import LONG_S
from waiting import wait_until

from consumers.poller import LanePoller
from consumers.records import Assignment, CommitPoint, Partition, Record
from schemas.kafka import client_config
from schemas.settings import Settings
from tapeline.topics import ensure_topics

MakeSettings = Callable[..., Settings]
LANE = "realtime"
NUM_RECORDS = 20
WAIT_MS = 3_000


class Taker:
    """Takes whatever comes, one batch behind the other."""

    def __init__(self) -> None:
        self.batches: list[list[Record]] = []

    def num_records(self) -> int:
        return sum(map(len, self.batches))

    def put(self, lane: str, records: list[Record]) -> None:
        self.batches.append(records)

    def num_queued(self, lane: str) -> int:
        return 0

    def max_queued(self, lane: str) -> int:
        return 2 * NUM_RECORDS

    def commit_failed(self, partitions: Sequence[Partition]) -> None:
        raise AssertionError("nothing is committed")

    async def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Whatever they are."""

    async def revoked(self, partitions: Sequence[Partition], *, lost: bool) -> list[CommitPoint]:
        return []


async def test_the_broker_gathers_records_where_the_lane_says_so(
    make_settings: MakeSettings,
) -> None:
    """Appended one by one, within a wait or on both sides of its end.

    The first of all shows that the consumer is waiting for more.
    """
    settings = make_settings(lanes={LANE: {"fetch_wait_ms": WAIT_MS}})
    await asyncio.to_thread(ensure_topics, settings)
    taker = Taker()
    poller = LanePoller(settings.lane(LANE), settings, taker, asyncio.get_running_loop())

    producer = Producer(client_config(settings))

    def append_one_by_one(num: int) -> None:
        for _ in range(num):
            producer.produce(settings.lane(LANE).topic, b"", partition=0)
            assert producer.flush(LONG_S) == 0

    async def until_taken(num: int) -> None:
        await asyncio.to_thread(
            wait_until, lambda: taker.num_records() == num, LONG_S, f"{num} records"
        )

    try:
        poller.start()
        await asyncio.to_thread(append_one_by_one, 1)
        await until_taken(1)
        await asyncio.to_thread(append_one_by_one, NUM_RECORDS)
        await until_taken(1 + NUM_RECORDS)
        sizes = [len(batch) for batch in taker.batches]
        assert len(sizes) <= 3, sizes
    finally:
        await poller.close()
