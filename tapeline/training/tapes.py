"""Recorded events as a tape of windows, by the code that serves: decoder, channels, windows."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from consumers.channels import channel_set
from consumers.columns import BOOK, QUOTE, EventColumns, EventDecoder, name_of
from consumers.records import Partition
from consumers.windows import WindowStore
from inference.training.tape import Tape
from schemas.codec import Codec
from schemas.kafka import message_headers
from schemas.messages import MAX_BOOK_LEVELS
from schemas.settings import Settings, WindowSettings
from tapeline.reading import ShowProgress, read_spans, spans_between
from tapeline.sources import EventSource

T = TypeVar("T")

_BATCH = 1024  # events at a time
_FILES: Partition = ("files", 0)


@dataclass(slots=True)
class _SymbolRows:
    """What the window store has said of one symbol's events, so far.

    Attributes:
        times_us, mids, full: of each event.
        newest: the newest row of each window that is full.
        firsts: of each stretch of full windows, the whole first one, (T, C).
    """

    times_us: list[NDArray[np.int64]] = field(default_factory=list)
    mids: list[NDArray[np.float64]] = field(default_factory=list)
    full: list[NDArray[np.bool_]] = field(default_factory=list)
    newest: list[NDArray[np.float32]] = field(default_factory=list)
    firsts: list[NDArray[np.float32]] = field(default_factory=list)


class TapeRecorder:
    """Collects what ``WindowStore`` hands out, each row once.

    A window and the next one of its symbol share all rows but one: of a full window that follows a
    full one only the newest row is kept. What the windows hold is never worked out here.
    """

    def __init__(self, settings: WindowSettings) -> None:
        self._num_steps = settings.num_steps
        self._store = WindowStore(channel_set(settings.channel_set), settings)
        self._symbols: dict[tuple[Partition, bytes], _SymbolRows] = {}

    def assign(self, partition: Partition) -> None:
        """Before the first events of a partition."""
        self._store.assign(partition)

    def append(self, partition: Partition, offsets: Sequence[int], events: EventColumns) -> None:
        """Events of one partition, by their offsets."""
        num = len(events)
        everyone, always = np.ones(num, bool), np.zeros(num, np.int64)
        appended = self._store.append([partition] * num, offsets, events, everyone, always)
        places: defaultdict[bytes, list[int]] = defaultdict(list)
        for place, symbol in enumerate(events.symbols):
            places[symbol].append(place)
        window_of = np.cumsum(appended.full) - 1
        mids = quoted_mids(events)
        for symbol, those in places.items():
            of_symbol = self._symbols.setdefault((partition, symbol), _SymbolRows())
            full = appended.full[those]
            before = of_symbol.full[-1][-1] if of_symbol.full else False
            starts = full & ~np.concatenate([[before], full[:-1]])
            windows = appended.windows[window_of[those][full]]
            of_symbol.newest.append(windows[:, :, -1].copy())  # a view would keep all of them
            of_symbol.firsts += [window.T.copy() for window in windows[starts[full]]]
            of_symbol.times_us.append(events.times_us[those])
            of_symbol.mids.append(mids[those])
            of_symbol.full.append(full)

    def tape(self) -> Tape:
        """All that was collected."""
        parts = [
            run
            for (_, symbol), rows in self._symbols.items()
            for run in _runs(":".join(name_of(symbol)), rows, self._num_steps)
        ]
        if not parts:
            num_channels = self._store.channels.num_channels
            nothing = np.zeros(0)
            return Tape(
                np.zeros((0, num_channels), np.float32), nothing.astype(np.int64), nothing,
                nothing.astype(np.int64), (), self._num_steps,
            )  # fmt: skip
        sizes = [len(part.rows) for part in parts]
        return Tape(
            rows=np.concatenate([part.rows for part in parts]),
            times_us=np.concatenate([part.times_us for part in parts]),
            mids=np.concatenate([part.mids for part in parts]),
            runs=np.repeat(np.arange(len(parts)), sizes),
            symbols=tuple(symbol for part in parts for symbol in part.symbols),
            num_steps=self._num_steps,
        )


def quoted_mids(events: EventColumns) -> NDArray[np.float64]:
    """The mid of each quote or book with both best prices; NaN for the rest: (n,)."""
    ask = np.where(events.kinds == BOOK, 2 * MAX_BOOK_LEVELS, 2)
    bids, asks = events.values[:, 0], events.values[np.arange(len(events)), ask]
    has_both = np.isin(events.kinds, (QUOTE, BOOK)) & (bids > 0) & (asks > 0)
    return np.where(has_both, (bids + asks) / 2, np.nan)


def _runs(symbol: str, rows: _SymbolRows, num_steps: int) -> Iterator[Tape]:
    """A symbol's stretches of full windows, each a tape of its own."""
    times_us, full = np.concatenate(rows.times_us), np.concatenate(rows.full)
    mids = _filled(np.concatenate(rows.mids))
    newest = np.concatenate(rows.newest)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], full, [False]])))
    begin_row = 0
    for (begin, end), first in zip(edges.reshape(-1, 2), rows.firsts, strict=True):
        end_row = begin_row + end - begin
        events = slice(begin - num_steps + 1, end)
        yield Tape(
            rows=np.concatenate([first, newest[begin_row + 1 : end_row]]),
            times_us=times_us[events],
            mids=mids[events],
            runs=np.zeros(0, np.int64),
            symbols=(symbol,),
            num_steps=num_steps,
        )
        begin_row = end_row


def _filled(mids: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN becomes what was known before it."""
    newest = np.maximum.accumulate(np.where(np.isnan(mids), -1, np.arange(len(mids))))
    return np.where(newest < 0, np.nan, mids[newest])


def record_files(
    source: EventSource, settings: Settings, progress: Callable[[], None] = lambda: None
) -> Tape:
    """The windows that one partition with all these events would give.

    Raises ConfigError when a file turns out to be damaged.
    """
    recorder, decoder = TapeRecorder(settings.window), _decoder(settings)
    recorder.assign(_FILES)
    offset = 0
    for events in _in_batches(source):
        columns = decoder.columns_of(events)
        recorder.append(_FILES, range(offset, offset + len(columns)), columns)
        offset += len(columns)
        progress()
    return recorder.tape()


def record_lane(
    settings: Settings,
    lane: str,
    *,
    since_us: int | None = None,
    until_us: int | None = None,
    progress: ShowProgress | None = None,
) -> Tape:
    """The windows of a lane's topic, as a worker would make them from the first of these records.

    Events that come again are left out, as are records that are no event.

    Args:
        since_us, until_us: append times, by the topic's clock.

    Raises:
        ConfigError: no such lane, no broker, no topic.
        TransientError: the broker fell silent.
    """
    recorder, decoder = TapeRecorder(settings.window), _decoder(settings)
    spans = spans_between(settings, [settings.lane(lane).topic], since_us, until_us)
    for partition in spans:
        recorder.assign(partition)
    seen: set[int] = set()
    for messages in _in_batches(read_spans(settings, spans, progress)):
        by_partition = defaultdict(list)
        for message in messages:
            by_partition[message.topic() or "", message.partition() or 0].append(message)
        for partition, those in by_partition.items():
            columns, poison = decoder.decode(
                [one.value() for one in those], [message_headers(one) for one in those]
            )
            offsets = [one.offset() or 0 for n, one in enumerate(those) if n not in poison]
            is_new = [_is_new(seen, event_id) for event_id in columns.ids]
            kept = [offset for offset, new in zip(offsets, is_new, strict=True) if new]
            recorder.append(partition, kept, columns.those(is_new))
    return recorder.tape()


def _is_new(seen: set[int], event_id: str) -> bool:
    """Whether nobody asked before; 64 bits of an id are enough to know it by."""
    known = hash(event_id)
    is_new = known not in seen
    seen.add(known)
    return is_new


def _decoder(settings: Settings) -> EventDecoder:
    check = channel_set(settings.window.channel_set).check
    return EventDecoder(Codec(settings.schema_registry), check, settings.worker.max_message_bytes)


def _in_batches(items: Iterable[T]) -> Iterator[list[T]]:
    remaining = iter(items)
    while batch := list(islice(remaining, _BATCH)):
        yield batch
