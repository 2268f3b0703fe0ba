"""What a ledger works out by itself: which records are duplicates, and whose window is full.

Sans-IO, and written from docs/DESIGN.md 3.3 and 3.4 alone: it shares no code with the worker, whose
books it checks. Where nobody can know, it answers so: a copy may be a guess, and a window has a
least and a most number of rows.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, NamedTuple

from schemas.settings import WindowSettings

FIRST, COPY, GUESS = range(3)
"""An entry's role: the first of its event id, a duplicate, or nobody can say."""

_MAX_HYPOTHESES = 16


class Source(NamedTuple):
    """Where a record stands."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}:{self.partition}:{self.offset}"


class Event(NamedTuple):
    """What an input and its output must agree on."""

    event_id: str
    venue: str
    symbol: str
    event_time_us: int


class Partition:
    """One partition's records by offset, ascending; all from ``first`` up to ``end``, exclusive."""

    def __init__(
        self, topic: str, number: int, first: int, end: int, committed: int | None
    ) -> None:
        self.topic, self.number, self.first, self.end = topic, number, first, end
        self.committed = committed
        self.entries: dict[int, Entry] = {}


class Entry:
    """One input record and what came out for it; ``event`` is None for poison.

    ``published_us``: when its first feature was appended, where a lane skips what is late; else 0.
    """

    __slots__ = (
        "appended_us",
        "bits",
        "digest",
        "event",
        "group",
        "num_features",
        "num_letters",
        "offset",
        "partition",
        "published_us",
        "replayed_from",
        "role",
        "stage",
    )

    def __init__(
        self, partition: Partition, offset: int, event: Event | None, appended_us: int
    ) -> None:
        self.partition = partition
        self.offset = offset
        self.event = event
        self.appended_us = appended_us
        self.digest: bytes | None = None
        self.replayed_from: Source | None = None
        self.num_features = self.num_letters = self.published_us = 0
        self.bits = b""
        self.stage = ""
        self.role = FIRST
        self.group: Guess | None = None

    @property
    def source(self) -> Source:
        return Source(self.partition.topic, self.partition.number, self.offset)

    @property
    def has_marked_end(self) -> bool:
        """It ended in a way that shows that its id counted as first seen here."""
        return self.num_features > 0 or self.stage == "infer"


def offsets_maybe_late(partition: Partition, deadline_ms: float, asked_us: int) -> set[int]:
    """The offsets without a feature whose records may have been late when they were prepared.

    A symbol's events are prepared in their order, so each was so before the symbol's next feature
    was appended; where none follows, before ``asked_us``. Kafka's times are whole milliseconds,
    rounded down, and so is the deadline here.
    """
    deadline_us = int(deadline_ms) * 1000
    next_us: dict[tuple[str, str], int] = {}
    late: set[int] = set()
    for entry in reversed(partition.entries.values()):
        if entry.event is None:
            continue
        key = (entry.event.venue, entry.event.symbol)
        if entry.num_features:
            next_us[key] = entry.published_us
        elif next_us.get(key, asked_us) >= entry.appended_us + deadline_us:
            late.add(entry.offset)
    return late


class Guess:
    """Copies in several partitions of which none shows that it was the first."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = entries
        self.num_lost = 0  # of them, those that would be lost if they were the first


class Sightings:
    """Which record of an event id is the first, of one lane or of all together.

    Args:
        ttl_s: how long the workers remember an id; a copy that comes later may count as new.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_us = int(ttl_s * 1e6)
        self._first: dict[str, Entry] = {}
        self._copies: dict[str, list[Entry]] = {}
        self.guesses: list[Guess] = []

    def add(self, event_id: str, entry: Entry) -> None:
        first = self._first.setdefault(event_id, entry)
        if first is not entry:
            self._copies.setdefault(event_id, [first]).append(entry)

    def published_elsewhere(self, event_id: str, entry: Entry) -> bool:
        """Another record of this id has a feature."""
        copies = self._copies.get(event_id, ())
        return any(one.num_features for one in copies if one is not entry)

    def resolve(self, letters_gone_until_us: float) -> None:
        """Says of every copy whether it is one; call it when all outputs are in."""
        for entries in self._copies.values():
            entries.sort(key=lambda one: (one.appended_us, one.partition.number, one.offset))
            known = {one.source: one for one in entries}
            originals = [one for one in entries if one.replayed_from not in known]
            self._resolve_originals(originals)
            holders: dict[Source, Entry] = {}
            for one in entries:
                if one.replayed_from not in known:
                    continue
                holder = holders.get(one.replayed_from, known[one.replayed_from])
                if holder.stage and not holder.num_features:  # what failed gives its place away
                    one.role = FIRST
                    holders[one.replayed_from] = one
                else:
                    purged = holder.appended_us <= letters_gone_until_us
                    one.role = GUESS if purged else COPY

    def _resolve_originals(self, originals: list[Entry]) -> None:
        heads: dict[int, Entry] = {}
        for one in originals:
            head = heads.setdefault(id(one.partition), one)
            if one.offset < head.offset:
                heads[id(one.partition)] = one
        marked = [one for one in originals if one.has_marked_end and one in heads.values()]
        if len(heads) > 1 and not marked:
            guess = Guess(list(heads.values()))
            self.guesses.append(guess)
            for one in originals:
                one.role = GUESS if one in guess.entries else COPY
                one.group = guess if one in guess.entries else None
            return
        first = (marked or originals)[0] if len(heads) > 1 else next(iter(heads.values()))
        for one in originals:
            if one is first:
                one.role = FIRST
            elif one.appended_us - first.appended_us > self._ttl_us:
                one.role = FIRST if one.has_marked_end else GUESS
            else:
                one.role = COPY


_Before = tuple[int, int] | Literal["nothing", "anything"]


class _Symbol:
    """A window by what may be in it: hypotheses on its last row, and bounds of its rows."""

    __slots__ = ("before", "least", "most")

    def __init__(self, before: tuple[_Before, ...], most: int) -> None:
        self.before, self.least, self.most = before, 0, most


class Windows:
    """The bookkeeping of one partition's windows, without the windows.

    Args:
        first: where reading began; above 0, rows before it may be in the windows.
    """

    def __init__(self, settings: WindowSettings, min_interval_us: int, first: int) -> None:
        self._steps = settings.num_steps
        self._max_gap_us = int(settings.max_gap_s * 1e6)
        self._max_idle = settings.max_idle_records
        self._max_symbols = settings.max_symbols
        self._interval_us = min_interval_us
        self._first = first
        self._symbols: OrderedDict[tuple[str, str], _Symbol] = OrderedDict()

    def append(
        self, event: Event, offset: int, *, certain: bool
    ) -> tuple[bool | None, bool | None]:
        """Adds a row, or perhaps one.

        Returns:
            The window is full; the event is the first of its interval. None: nobody can say.
        """
        key = (event.venue, event.symbol)
        symbol = self._symbols.get(key)
        if symbol is None:
            symbol = self._symbols[key] = self._new(offset)
        else:
            self._symbols.move_to_end(key)
        time_us = event.event_time_us
        voids, starts = self._compare(symbol.before, time_us, offset)
        least = 1 if True in voids else min(symbol.least + 1, self._steps)
        most = 1 if False not in voids else min(symbol.most + 1, self._steps)
        if certain:
            symbol.before, symbol.least, symbol.most = ((time_us, offset),), least, most
        else:
            before: tuple[_Before, ...] = (*symbol.before, (time_us, offset))
            symbol.before = before if len(before) <= _MAX_HYPOTHESES else ("nothing", "anything")
            symbol.least, symbol.most = min(symbol.least, least), max(symbol.most, most)
        full = True if least == self._steps else None if most == self._steps else False
        return full, starts.pop() if len(starts) == 1 else None

    def _new(self, offset: int) -> _Symbol:
        # Who is not among the last max_symbols seen was evicted, even if seen before the beginning.
        evicted = len(self._symbols) == self._max_symbols
        if evicted:
            self._symbols.popitem(last=False)
        if self._first == 0 or evicted or offset - self._first >= self._max_idle:
            return _Symbol(("nothing",), 0)
        return _Symbol(("nothing", "anything"), self._steps)

    def _compare(
        self, before: tuple[_Before, ...], time_us: int, offset: int
    ) -> tuple[set[bool], set[bool]]:
        """Whether the window began anew, and an interval with it: every answer that may be."""
        voids, starts = set(), set()
        for one in before:
            if one == "nothing":
                voids.add(True)
                starts.add(True)
            elif one == "anything":
                voids.add(False)
                starts |= {True, self._interval_us == 0}
            else:
                assert isinstance(one, tuple)
                void = time_us - one[0] > self._max_gap_us or offset - one[1] > self._max_idle
                length = self._interval_us
                voids.add(void)
                starts.add(void or length == 0 or time_us // length != one[0] // length)
        return voids, starts
