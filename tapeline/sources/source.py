"""One door to all formats: files in, checked market events out, every row accounted for.

A reader is a function that opens one file and returns an iterator of (row number, event); it says
to its ``Tally`` what became of the rows that gave none.
"""

import gzip
import heapq
import io
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO, Self, cast

import msgspec

from schemas.errors import ConfigError
from schemas.messages import InvalidEvent, MarketEvent, check_event

MAX_ROW_BYTES = 16 * 1024 * 1024  # a Binance snapshot of 5000 levels a side has 0.3 MB
MAX_EXAMPLES = 5  # of rejects and gaps, for display
MAX_MALFORMED_START = 100  # so many rows and not one of them readable: the format is wrong


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that is no event, and why. ``row`` counts from 1: the line, where there are lines."""

    path: Path
    row: int
    reason: str
    message: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.row}: {self.reason}: {self.message}"


@dataclass(frozen=True, slots=True)
class SourceStatistics:
    """What became of every row so far: rows = events + rejected + skipped, always.

    Attributes:
        rejected: rows that are wrong, by reason.
        skipped: rows that are right and yet no event of their own, by reason (``snapshot``).
        num_gaps: holes in the tape: jumps of a sequence, and lost diffs of a book.
        first_rejects, first_gaps: the first few, as text for the user.
    """

    rows: int
    events: int
    rejected: Mapping[str, int]
    skipped: Mapping[str, int]
    num_gaps: int
    first_rejects: tuple[Reject, ...]
    first_gaps: tuple[str, ...]

    @property
    def num_rejected(self) -> int:
        return sum(self.rejected.values())

    @property
    def num_skipped(self) -> int:
        return sum(self.skipped.values())


class Tally:
    """The counters behind ``SourceStatistics``, shared by the readers of one source."""

    def __init__(self) -> None:
        self.rows = self.events = self.num_gaps = 0
        self._rejected: Counter[str] = Counter()
        self._skipped: Counter[str] = Counter()
        self._first_rejects: list[Reject] = []
        self._first_gaps: list[str] = []
        self._sequences: dict[tuple[str, str], int] = {}
        self._jumps: set[tuple[str, str]] = set()

    def reject(self, path: Path, row: int, reason: str, message: str) -> None:
        self._rejected[reason] += 1
        if self.rows == self._rejected["malformed"] == MAX_MALFORMED_START:
            raise ConfigError(
                f"none of the first {self.rows} rows of {path} can be read (row 1: "
                f"{self._first_rejects[0].message}); name its real format with --format"
            )
        if len(self._first_rejects) < MAX_EXAMPLES:
            self._first_rejects.append(Reject(path, row, reason, message))

    def skip(self, reason: str) -> None:
        self._skipped[reason] += 1

    def gap(self, text: str) -> None:
        self.num_gaps += 1
        if len(self._first_gaps) < MAX_EXAMPLES:
            self._first_gaps.append(text)

    def jump(self, venue: str, symbol: str) -> None:
        """The next event of this symbol is numbered one further, so that consumers see the gap."""
        self._jumps.add((venue, symbol))

    def number(self, event: MarketEvent) -> MarketEvent:
        """The event with its sequence number, where its format has none of its own."""
        key = (event.venue, event.symbol)
        last = self._sequences.get(key, 0)
        step = 1
        if key in self._jumps:
            self._jumps.remove(key)
            step = 2
        self._sequences[key] = last + step
        return msgspec.structs.replace(event, sequence=last + step)

    def watch(self, event: MarketEvent) -> None:
        """Counts a gap where the numbers that the file itself gives leave one out."""
        if event.sequence is None:
            return
        key = (event.venue, event.symbol)
        last = self._sequences.get(key)
        if last is not None and event.sequence > last + 1:
            missing = event.sequence - last - 1
            self.gap(
                f"{event.venue} {event.symbol}: sequence {event.sequence} follows {last}, "
                f"{missing} missing"
            )
        self._sequences[key] = max(event.sequence, last or event.sequence)

    def statistics(self) -> SourceStatistics:
        return SourceStatistics(
            rows=self.rows,
            events=self.events,
            rejected=MappingProxyType(dict(self._rejected)),
            skipped=MappingProxyType(dict(self._skipped)),
            num_gaps=self.num_gaps,
            first_rejects=tuple(self._first_rejects),
            first_gaps=tuple(self._first_gaps),
        )


class InputFile:
    """One opened file that knows how far it has been read, in bytes as they lie on the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.raw = path.open("rb")
        except IsADirectoryError as error:
            raise ConfigError(f"{path} is a folder; name the files in it instead") from error
        except FileNotFoundError as error:
            raise ConfigError(f"there is no file {path}; check the path") from error
        except OSError as error:
            raise ConfigError(
                f"cannot read {path}: {error.strerror}; check the path and its permissions"
            ) from error
        self.total_bytes = path.stat().st_size
        self.bytes_read = 0

    def stream(self) -> BinaryIO:
        """The file's bytes, unpacked if it is gzip by its first bytes, whatever its name."""
        if self.raw.peek(2)[:2] == b"\x1f\x8b":
            # GzipFile's own readline is slow; a BufferedReader around it is not.
            unpacked = gzip.GzipFile(fileobj=self.raw)
            return cast("BinaryIO", io.BufferedReader(cast("io.RawIOBase", unpacked), 1 << 17))
        return self.raw

    def mark(self) -> None:
        self.bytes_read = self.raw.tell()

    def close(self) -> None:
        self.raw.close()


@dataclass(frozen=True, slots=True)
class ReaderRequest:
    """All that a reader gets: the file, the user's words about it, and where to count."""

    file: InputFile
    tally: Tally
    symbol: str | None
    venue: str | None

    @property
    def path(self) -> Path:
        return self.file.path


Rows = Iterator[tuple[int, MarketEvent]]
Reader = Callable[[ReaderRequest], Rows]


@dataclass(frozen=True, slots=True)
class Format:
    """One file format.

    Attributes:
        file_names: matches the names that leave no doubt.
        read: opens; raises ConfigError at once for a file that can give nothing.
        numbers_events: the reader sees the whole stream, so that Tapeline numbers its events.
    """

    name: str
    file_names: re.Pattern[str]
    read: Reader
    numbers_events: bool = False


class EventSource(Iterator[MarketEvent]):
    """The events of some files, merged by event time; an iterator that is read once.

    Reading blocks on the disk. Each event has passed ``check_event``. ``statistics`` and
    ``bytes_read`` may be asked at any time; a merge of several files reads one event of each ahead.

    Raises:
        ConfigError: from ``next`` too, when a file turns out to be cut off or corrupt.
    """

    def __init__(self, requests: Sequence[tuple[ReaderRequest, Format]], *, tally: Tally) -> None:
        self._tally = tally
        self._files = [request.file for request, _ in requests]
        streams = [self._events(request, format_) for request, format_ in requests]
        merged = heapq.merge(*streams, key=lambda pair: pair[0].event_time_us)
        self._numbered = self._number(streams[0] if len(streams) == 1 else merged)

    def __next__(self) -> MarketEvent:
        return next(self._numbered)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the reading: ``next`` raises StopIteration from here on."""
        self._numbered.close()
        self._close_files()

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(file.path for file in self._files)

    @property
    def bytes_read(self) -> int:
        """Of ``total_bytes``: the position in the files as they are stored, compressed or not."""
        return sum(file.bytes_read for file in self._files)

    @property
    def total_bytes(self) -> int:
        return sum(file.total_bytes for file in self._files)

    def statistics(self) -> SourceStatistics:
        return self._tally.statistics()

    def _events(
        self, request: ReaderRequest, format_: Format
    ) -> Iterator[tuple[MarketEvent, bool]]:
        path, tally, file = request.path, self._tally, request.file
        rows = format_.read(request)  # here and not in the generator: a bad file shows at once
        return _checked(rows, path=path, tally=tally, file=file, numbers=format_.numbers_events)

    def _number(
        self, events: Iterator[tuple[MarketEvent, bool]]
    ) -> Generator[MarketEvent, None, None]:
        for event, numbers in events:
            if numbers:
                yield self._tally.number(event)
            else:
                self._tally.watch(event)
                yield event
        self._close_files()

    def _close_files(self) -> None:
        for file in self._files:
            file.close()


def _checked(
    rows: Rows, *, path: Path, tally: Tally, file: InputFile, numbers: bool
) -> Iterator[tuple[MarketEvent, bool]]:
    for row, event in rows:
        try:
            check_event(event)
        except InvalidEvent as error:
            tally.reject(path, row, error.reason, str(error))
            continue
        tally.events += 1
        yield event, numbers
    file.bytes_read = file.total_bytes


def read_lines(
    request: ReaderRequest, stream: BinaryIO | None = None
) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end); blank and endless lines are only counted.

    ``stream``: what is read, if not the file itself.
    """
    file, tally = request.file, request.tally
    stream = stream or file.stream()
    number = 0
    try:
        while line := stream.readline(MAX_ROW_BYTES + 1):
            number += 1
            tally.rows += 1
            if number % 256 == 1:
                file.mark()
            if len(line) > MAX_ROW_BYTES:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(MAX_ROW_BYTES)
                tally.reject(file.path, number, "too_long", f"more than {MAX_ROW_BYTES} bytes")
            elif line.isspace():
                tally.skip("blank")
            else:
                yield number, line.rstrip(b"\r\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"{file.path} is damaged after line {number} ({error}); fetch or pack it again"
        ) from error
    except OSError as error:
        raise ConfigError(f"cannot read on in {file.path}: {error}; check the disk") from error
