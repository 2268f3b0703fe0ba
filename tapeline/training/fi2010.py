"""FI-2010, the benchmark of limit order books, in its published text format.

Ntakaris, Magris, Kanniainen, Gabbouj and Iosifidis, "Benchmark dataset for mid-price forecasting of
limit order book data with machine learning methods", Journal of Forecasting 37 (2018). Users fetch
it themselves. A file is a matrix of 149 rows, one column an event: 144 features, then the labels
at 10, 20, 30, 50 and 100 events (1 up, 2 stationary, 3 down).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from inference.training.labels import DOWN, FLAT, UP, Split
from inference.training.tape import Part, Tape
from schemas.errors import ConfigError

CHANNELS_VERSION = "fi2010-book"
HORIZONS = (10, 20, 30, 50, 100)
_NUM_ROWS, _FIRST_LABEL, _NUM_LEVELS = 149, 144, 10
_NUM_BOOK = 4 * _NUM_LEVELS
_KINDS = np.array([0, UP, FLAT, DOWN], np.int8)
# The files have no times. A hundred rows a second makes a block of an interval 500 rows.
_STEP_US = 10_000


def read_fi2010(
    train: Path,
    test: Sequence[Path],
    horizons: Sequence[int],
    *,
    num_steps: int,
    validation_share: float,
) -> Split:
    """The published setup 2: one file to train on, others to test on.

    The book's ten levels become 40 channels in the order of ``market50-v1``: bid prices, bid sizes,
    ask prices, ask sizes. Labels are the files' own. As in what is published, the stocks and days
    of a file are one series.

    Args:
        validation_share: of the training file, its end.

    Raises ConfigError for a file that is not of this format, and for other horizons.
    """
    if unknown := sorted(set(horizons) - set(HORIZONS)):
        raise ConfigError(
            f"FI-2010 has labels at {', '.join(map(str, HORIZONS))} events, not at {unknown[0]}"
        )
    columns = [HORIZONS.index(horizon) for horizon in horizons]
    known, known_labels = _tape([train], num_steps)
    asked, asked_labels = _tape(test, num_steps)
    ends, cut = known.ends(), round(len(known.rows) * (1 - validation_share))
    labels = known_labels[:, columns]
    early = ends[ends < cut - max(horizons)]
    late = ends[ends >= cut + num_steps - 1]
    if not len(early) or not len(late):
        raise ConfigError(f"{train} is too short for windows of {num_steps} rows in both parts")
    return Split(
        train=Part(known, early, labels[early]),
        validation=Part(known, late, labels[late]),
        test=Part(asked, asked.ends(), asked_labels[:, columns][asked.ends()]),
        thresholds_bps=(),
        num_embargoed=len(ends) - len(early) - len(late),
    )


def _tape(paths: Sequence[Path], num_steps: int) -> tuple[Tape, NDArray[np.int8]]:
    """The files' rows, a run each, and the labels of all rows: (R, 5)."""
    read = [_read(path) for path in paths]
    rows = np.concatenate([rows for rows, _ in read])
    tape = Tape(
        rows=rows,
        times_us=np.arange(len(rows)) * _STEP_US,
        mids=np.full(len(rows), np.nan),
        runs=np.repeat(np.arange(len(read)), [len(rows) for rows, _ in read]),
        symbols=tuple(f"fi2010:{path.stem}" for path in paths),
        num_steps=num_steps,
    )
    return tape, np.concatenate([labels for _, labels in read])


def _read(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Channels (R, 40) and labels (R, 5) of one file."""
    book: list[NDArray[np.float64]] = []
    kinds: list[NDArray[np.float64]] = []
    number = 0
    try:
        with path.open() as lines:
            for number, line in enumerate(filter(str.strip, lines), start=1):
                if number <= _NUM_BOOK:
                    book.append(np.array(line.split(), np.float64))
                elif number > _FIRST_LABEL:
                    kinds.append(np.array(line.split(), np.float64))
        matrix, labels = np.array(book, np.float32), np.array(kinds)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no FI-2010 matrix, in row {number}: {error}") from error
    if number != _NUM_ROWS or not np.isin(labels, (1, 2, 3)).all():
        raise ConfigError(
            f"{path} is no FI-2010 matrix: it has {number} rows, not {_NUM_ROWS} with labels 1, 2 "
            "and 3 in the last five; give a file such as Train_Dst_NoAuction_ZScore_CF_7.txt"
        )
    levels = matrix.reshape(_NUM_LEVELS, 4, -1)  # ask price, ask size, bid price, bid size
    sides = levels[:, [2, 3, 0, 1]].transpose(1, 0, 2).reshape(_NUM_BOOK, -1)
    return np.ascontiguousarray(sides.T), _KINDS[labels.astype(int)].T
