"""What a window should have foretold: where the mid-price goes, smoothed; and parts in time.

The label of Zhang, Zohren and Roberts (2019), equation 3, after Ntakaris et al. (2018): the mean of
the next ``k`` mids against the mid now, up or down where it is beyond a threshold. Their equation 4
compares with the mean of the *last* k mids, of which a window already shows most.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from inference.training.tape import Floats, Ints, Part, Tape
from schemas.errors import ConfigError

CLASSES = ("down", "flat", "up")
DOWN, FLAT, UP = range(3)
UNKNOWN = -1
_FLAT_SHARE = 1 / 3
_NOISE_BPS = 1e-6  # below it a move is the rounding of sums


def score_names(horizons: Sequence[int]) -> tuple[str, ...]:
    """``down_10``, ``flat_10``, ``up_10``, ...: one group of scores for each horizon."""
    return tuple(f"{name}_{horizon}" for horizon in horizons for name in CLASSES)


def moves_bps(tape: Tape, horizons: Sequence[int]) -> Floats:
    """Mean of the next ``k`` mids of the run against the mid now, basis points: (R, H).

    NaN where the run ends before, or where there is no mid yet.
    """
    moves = np.full((len(tape.rows), len(horizons)), np.nan)
    for begin, end in _quoted(tape):
        mids = tape.mids[begin:end]
        for column, horizon in enumerate(horizons):
            if len(mids) > horizon:
                now, ahead = mids[:-horizon], _means(mids, horizon)[1:]
                moves[begin : end - horizon, column] = (ahead - now) / now * 1e4
    return moves


def past_moves_bps(tape: Tape, horizons: Sequence[int]) -> Floats:
    """The mid now against the mean of the ``k`` mids before it, basis points: (R, H).

    For a guess that it goes on. 0 where a run has not so many.
    """
    moves = np.zeros((len(tape.rows), len(horizons)))
    for begin, end in _quoted(tape):
        mids = tape.mids[begin:end]
        for column, horizon in enumerate(horizons):
            if len(mids) > horizon:
                now, behind = mids[horizon:], _means(mids, horizon)[:-1]
                moves[begin + horizon : end, column] = (now - behind) / now * 1e4
    return moves


def _means(mids: Floats, num: int) -> Floats:
    """Of each ``num`` neighbours: n of them to n - num + 1."""
    sums = np.concatenate([[0.0], np.cumsum(mids - mids[0])])  # kept small, so that they are exact
    means: Floats = mids[0] + (sums[num:] - sums[:-num]) / num
    return means


def _quoted(tape: Tape) -> Iterator[tuple[int, int]]:
    """The rows of each run from its first mid on; from there every row has one."""
    for begin, end in run_bounds(tape):
        missing = int(np.isnan(tape.mids[begin:end]).sum())
        if begin + missing < end:
            yield begin + missing, end


def run_bounds(tape: Tape) -> list[tuple[int, int]]:
    """First row, and the one after the last, of each run."""
    if not len(tape.runs):
        return []
    cuts = np.flatnonzero(np.diff(tape.runs)) + 1
    edges = [0, *cuts.tolist(), len(tape.runs)]
    return list(pairwise(edges))


def thresholds_bps(moves: Floats) -> tuple[float, ...]:
    """For each horizon the size below which a third of these moves lies: (n, H) to H of them."""
    return tuple(
        max(float(np.quantile(np.abs(column[~np.isnan(column)]), _FLAT_SHARE)), _NOISE_BPS)
        for column in moves.T
    )


def directions(moves: Floats, thresholds: Sequence[float]) -> NDArray[np.int8]:
    """Moves in bps, (n, H), as labels: int8, (n, H)."""
    labels = np.full(moves.shape, FLAT, np.int8)
    labels[moves > thresholds] = UP
    labels[moves < -np.asarray(thresholds)] = DOWN
    labels[np.isnan(moves)] = UNKNOWN
    return labels


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A tape in parts, one after the other in time.

    Attributes:
        thresholds_bps: for each horizon, of the training part alone.
        num_embargoed: windows left out, because they or their labels reach over a cut.
    """

    train: Part
    validation: Part
    test: Part
    thresholds_bps: tuple[float, ...]
    num_embargoed: int


def split(tape: Tape, horizons: Sequence[int], shares: tuple[float, float]) -> Split:
    """Cuts a tape at two moments, for all symbols alike.

    A window is in a part if its oldest row and the last mid of its longest label both are. All
    symbols are cut at the same moments, for they move together: a later part that overlapped with
    another symbol's earlier one would tell of it.

    Args:
        shares: of all windows, for training and for validation; the rest is the test.

    Raises ConfigError if a part is empty.
    """
    ends = tape.ends()
    moves = moves_bps(tape, horizons)[ends]
    longest = max(horizons)
    whole = ~np.isnan(moves).any(axis=1)
    ends, moves = ends[whole], moves[whole]
    if not len(ends):
        raise ConfigError(
            f"no window of {tape.num_steps} events is followed by {longest} more with a best bid "
            "and ask; give longer tapes, with quotes or books, or shorter horizons"
        )
    begin_us = tape.times_us[ends - tape.num_steps + 1]
    until_us = tape.times_us[ends + longest]
    first, second = np.quantile(tape.times_us[ends], np.cumsum(shares), method="lower").tolist()
    chosen = (
        until_us < first,
        (begin_us >= first) & (until_us < second),
        begin_us >= second,
    )
    for name, those in zip(("training", "validation", "test"), chosen, strict=True):
        if not those.any():
            raise ConfigError(
                f"the {name} part of these tapes has no window of {tape.num_steps} events that "
                f"ends {longest} events before the part does; give longer tapes or other shares"
            )
    thresholds = thresholds_bps(moves[chosen[0]])
    train, validation, test = (
        Part(tape, ends[those], directions(moves[those], thresholds)) for those in chosen
    )
    return Split(
        train, validation, test, thresholds, len(ends) - sum(map(np.count_nonzero, chosen))
    )


def labelled(tape: Tape, horizons: Sequence[int], thresholds: Sequence[float]) -> Part:
    """All windows of a tape with the labels of these thresholds; ``UNKNOWN`` near ends of runs."""
    ends = tape.ends()
    return Part(tape, ends, directions(moves_bps(tape, horizons)[ends], thresholds))


def covered(part: Part) -> NDArray[np.bool_]:
    """Which rows of its tape a part's windows hold: bool, (R,)."""
    changes: Ints = np.zeros(len(part.tape.rows) + 1, np.int64)
    np.add.at(changes, part.ends - part.tape.num_steps + 1, 1)
    np.add.at(changes, part.ends + 1, -1)
    return np.cumsum(changes[:-1]) > 0
