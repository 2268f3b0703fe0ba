"""Recorded windows as training holds them: every row once, and where the windows end."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Tape:
    """The rows behind ``N`` full windows; neighbours share all but one of theirs.

    A *run* is what lies in one symbol's window store without a break: its rows stand together here,
    in order, and no window and no label reaches from one run into another.

    Attributes:
        rows: float32, (R, C), as a channel set makes them.
        times_us: int64, (R,): event time of each row.
        mids: float64, (R,): mid of the symbol's newest best bid and ask; NaN before there are both.
        runs: int64, (R,): the number of each row's run, never falling.
        symbols: of each run, ``venue:symbol``.
        num_steps: ``T``, the length of a window.
    """

    rows: NDArray[np.float32]
    times_us: Ints
    mids: Floats
    runs: Ints
    symbols: tuple[str, ...]
    num_steps: int

    @property
    def num_channels(self) -> int:
        return int(self.rows.shape[1])

    def ends(self) -> Ints:
        """The rows that complete a window, int64, (N,), rising."""
        first = self.num_steps - 1
        places = np.arange(first, len(self.rows))
        ends: Ints = places[self.runs[places] == self.runs[places - first]]
        return ends

    def windows(self, ends: Ints) -> NDArray[np.float32]:
        """The windows that end at these rows: float32, (n, C, T), oldest step first."""
        steps = ends[:, None] + np.arange(1 - self.num_steps, 1)
        return np.ascontiguousarray(self.rows[steps].transpose(0, 2, 1))

    def symbols_at(self, ends: Ints) -> NDArray[np.str_]:
        """The symbol of each of these rows."""
        return np.array(self.symbols or ("",))[self.runs[ends]]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Windows of a tape with what they should have said.

    Attributes:
        ends: int64, (n,): rows that complete them.
        labels: int8, (n, H), one for each horizon: 0 down, 1 flat, 2 up; -1: not known.
    """

    tape: Tape
    ends: Ints
    labels: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.ends)

    def windows(self, chosen: Ints | slice) -> NDArray[np.float32]:
        return self.tape.windows(self.ends[chosen])

    def every(self, stride: int) -> "Part":
        """Each ``stride``-th window."""
        return Part(self.tape, self.ends[::stride], self.labels[::stride])

    def those(self, chosen: NDArray[np.bool_]) -> "Part":
        """The chosen windows, bool (n,)."""
        return Part(self.tape, self.ends[chosen], self.labels[chosen])

    @property
    def between_us(self) -> tuple[int, int]:
        """Event times of the first and the last window."""
        times_us = self.tape.times_us[self.ends]
        return int(times_us.min()), int(times_us.max())
