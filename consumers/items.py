"""Records on their way, as columns: from the decoder to the envelopes."""

from collections.abc import Sequence
from itertools import compress
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consumers.columns import EventColumns
from consumers.offsets import PartitionProgress
from consumers.records import Record

lane_of, partition_of, offset_of, value_of, headers_of, appended_us_of, polled_us_of = map(
    attrgetter, ("lane", "partition", "offset", "value", "headers", "appended_us", "polled_us")
)
"""A record's attributes, for ``map``."""


class Items(NamedTuple):
    """Records that are events: one of each for each of them, in their order.

    Attributes:
        progress: the assignments that they came by.
    """

    records: list[Record]
    progress: list[PartitionProgress]
    events: EventColumns

    @property
    def num(self) -> int:
        return len(self.records)

    def those(self, chosen: Sequence[bool]) -> "Items":
        """The chosen ones, in their order."""
        if all(chosen):
            return self
        return Items(
            list(compress(self.records, chosen)),
            list(compress(self.progress, chosen)),
            self.events.those(chosen),
        )

    def appended_us(self) -> NDArray[np.int64]:
        """When each was appended."""
        return np.fromiter(map(appended_us_of, self.records), np.int64, len(self.records))

    def are_live(self) -> list[bool]:
        """Whether each is owed a feature; else it only rebuilds its window."""
        if all(one.is_live for one in set(self.progress)):
            return [True] * len(self.records)
        pairs = zip(self.records, self.progress, strict=True)
        return [record.offset >= progress.live_from for record, progress in pairs]
