"""A ledger of one lane, filled by hand."""

from typing import Any

from schemas.lanes import LaneSettings
from schemas.settings import WindowSettings
from tapeline.bookkeeping import Event, Sightings, Source
from tapeline.ledger import Delivery, Feature, LaneAudit, Ledger, Letter, judge

START_US = 1_700_000_000_000_000
SECOND_US = 1_000_000


class Book:
    """A ledger filled by hand: windows of two rows, everything on partition 0 unless said.

    A record is appended as many seconds after the start as its offset says.
    """

    def __init__(
        self,
        delivery: Delivery = "at_least_once",
        *,
        firsts: tuple[int, ...] = (0, 0),
        committed: int | None = 100,
        sightings: Sightings | None = None,
        lane: str = "realtime",
        skip_after_ms: float | None = None,
        **window: Any,
    ) -> None:
        limits = {"num_steps": 2, "max_gap_s": 60, "max_idle_records": 50, "max_symbols": 3}
        settings = LaneSettings(
            name=lane,
            rank=1,
            deadline_ms=skip_after_ms or 50,
            reserved_share=0.5,
            expired="skip" if skip_after_ms else "process",
        )
        self.sightings = sightings or Sightings(ttl_s=3600)
        self.ledger = Ledger(settings, WindowSettings(**limits | window), self.sightings, delivery)
        self.ends: dict[int, int] = {}
        for number, first in enumerate(firsts):
            self.ledger.add_partition(number, first, 100, committed)
            self.ends[number] = 100
        self._events: dict[tuple[int, int], Event] = {}
        self._at = 0

    def source(self, offset: int, partition: int = 0) -> Source:
        return Source(self.ledger.lane.topic, partition, offset)

    def record(
        self,
        offset: int,
        event_id: str | None = None,
        *,
        symbol: str = "S",
        partition: int = 0,
        time_us: int = START_US,
        after_s: float | None = None,
        replayed_from: Source | None = None,
    ) -> None:
        event = Event(event_id or f"e{partition}-{offset}", "V", symbol, time_us)
        self._events[partition, offset] = event
        appended_us = START_US + int((offset if after_s is None else after_s) * SECOND_US)
        self.ledger.add_record(partition, offset, event, appended_us, replayed_from=replayed_from)

    def poison(self, offset: int) -> None:
        appended_us = START_US + offset * SECOND_US
        self.ledger.add_record(0, offset, None, appended_us, digest=b"poison")

    def feature(
        self,
        offset: int,
        partition: int = 0,
        bits: bytes = b"",
        after_s: float = 0,
        **changes: Any,
    ) -> None:
        event = self._events.get((partition, offset), Event("gone", "V", "S", START_US))
        source = changes.pop("source", self.source(offset, partition))
        appended_us = START_US + int(after_s * SECOND_US)
        self.ledger.add_feature(
            Feature(self._next("out"), source, event._replace(**changes), bits, appended_us)
        )

    def letter(self, offset: int, stage: str = "decode", digest: bytes = b"poison") -> None:
        event = self._events.get((0, offset))
        self.ledger.add_letter(
            Letter(self._next("dlq"), self.source(offset), stage, event, digest, START_US)
        )

    def judge(self, *, settled: bool = True, asked_after_s: float = 3600) -> LaneAudit:
        asked_us = START_US + int(asked_after_s * SECOND_US)
        judge({self.ledger: self.ends}, settled=settled, asked_us=asked_us)
        return self.ledger.audit()

    def kinds(self, **judge_by: Any) -> list[str]:
        self.judge(**judge_by)
        return [one.kind for one in self.ledger.violations()]

    def _next(self, topic: str) -> Source:
        self._at += 1
        return Source(topic, 0, self._at)


def full_window(delivery: Delivery = "at_least_once", **kwargs: Any) -> Book:
    """Three records of a symbol: the first warms up, two owe a feature. No output yet."""
    book = Book(delivery, **kwargs)
    for offset in (0, 1, 2):
        book.record(offset)
    return book
