"""Dead letters after the fact: find them, send them again, put them away.

A letter stays on its lane's ``.dlq`` topic until the topic's retention or ``delete_closed`` takes
it. What became of it is said by a *receipt*, a later record of the same partition without a value:
header ``dlq-receipt``, the letter's offset, and ``dlq-state``, ``replayed`` or ``purged``. A letter
without a receipt is open.

    letters   what a DLQ topic holds, and which of it is meant (no IO)
    index     the fold of letters and receipts into states (no IO)
    reading   the topics as they stand at one moment
    replaying letters back to where they came from, each receipt after its acknowledgement
    purging   receipts for what nobody wants again, and closed letters off the broker
"""

from tapeline.dlq.index import Index, IndexEntry, fold
from tapeline.dlq.letters import (
    Group,
    Letter,
    LetterId,
    Receipt,
    Selection,
    State,
    Unreadable,
)
from tapeline.dlq.purging import Deletion, delete_closed, mark_purged
from tapeline.dlq.reading import read_index, read_letters
from tapeline.dlq.replaying import ReplayReport, replay, replayed_headers

__all__ = [
    "Deletion",
    "Group",
    "Index",
    "IndexEntry",
    "Letter",
    "LetterId",
    "Receipt",
    "ReplayReport",
    "Selection",
    "State",
    "Unreadable",
    "delete_closed",
    "fold",
    "mark_purged",
    "read_index",
    "read_letters",
    "replay",
    "replayed_headers",
]
