"""What leaves a worker, and the door it leaves by."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from consumers.offsets import PartitionProgress, Span
from consumers.records import Record
from consumers.tracing import EventTrace
from schemas.errors import PoisonRecord

Outgoing = tuple[str, bytes | None, bytes, Sequence[tuple[str, bytes | None]]]
"""A message to publish: topic, key, value, headers."""


@dataclass(slots=True, eq=False)
class Parcel:
    """One partition's share of a micro-batch: what becomes durable together.

    Attributes:
        lane: its name.
        progress, span: the assignment it came by, and the records that end with it.
        messages: features in offset order, and dead letters; none if every record is a duplicate
            or warms a window up.
        features, letters: the records that have one among the messages.
        traces: of the features' events that are traced.
        delivered: True when all of it is durable; False when it is void, for whoever owns the
            partition then to do again.
    """

    lane: str
    progress: PartitionProgress
    span: Span
    messages: list[Outgoing] = field(default_factory=list)
    features: list[Record] = field(default_factory=list)
    letters: list[tuple[Record, PoisonRecord]] = field(default_factory=list)
    traces: list[EventTrace] = field(default_factory=list)
    delivered: asyncio.Future[bool] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Outlet(Protocol):
    """Where parcels go. One at least once for all lanes, or one exactly once for each lane."""

    async def open(self) -> None:
        """Makes ready to send. Raises ConfigError or TransientError."""

    async def run(self) -> None:
        """Works until cancelled. Raises what no retry can mend."""

    async def send(self, parcel: Parcel) -> None:
        """Takes a parcel; those of a partition in offset order. Waits only for room."""

    async def close(self, timeout_s: float) -> None:
        """Lets go of the producer; what is not delivered by then never will be."""
