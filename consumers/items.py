"""What the way of an event hands from the windows to the envelopes."""

from typing import NamedTuple

from consumers.offsets import PartitionProgress
from consumers.records import Record


class Item(NamedTuple):
    """A record whose window goes to the model.

    Attributes:
        progress: the assignment that it came by.
        key, symbol, head: as in ``EventColumns``.
    """

    record: Record
    progress: PartitionProgress
    key: bytes
    symbol: bytes
    head: bytes
