"""How good scores are on windows whose labels are known, and how sure that is.

Neighbouring windows share events and labels, so they do not count as so many observations:
intervals are of a block bootstrap over event time (Künsch, 1989), paired where two are compared.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from inference.training.labels import CLASSES, UNKNOWN
from inference.training.tape import Floats, Ints, Part

BLOCK_S = 5.0
_NUM_RESAMPLES = 2_000
_NUM_BINS = 10
_NUM_SLICES = 6
_NUM_CLASSES = len(CLASSES)

Labels = NDArray[np.int8] | NDArray[np.int64]


class Interval(BaseModel):
    """A figure, and where it lies with 95 % confidence."""

    model_config = ConfigDict(frozen=True)

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


class ClassReport(BaseModel):
    """One class against the others."""

    model_config = ConfigDict(frozen=True)

    precision: float
    recall: float
    f1: float
    num: int


class CalibrationBin(BaseModel):
    """Windows whose likeliest class was given about the same probability."""

    model_config = ConfigDict(frozen=True)

    num: int
    confidence: float
    accuracy: float


class BaselineReport(BaseModel):
    """Another guess on the same windows, and what the model has ahead of it."""

    model_config = ConfigDict(frozen=True)

    macro_f1: Interval
    model_ahead: Interval


class HorizonReport(BaseModel):
    """One horizon.

    Attributes:
        num: windows whose label is known.
        calibration_error: mean distance of confidence and accuracy over the bins, by their size.
        by_time: macro-F1 in so many equal slices of the time, with the epoch seconds they begin at.
    """

    model_config = ConfigDict(frozen=True)

    horizon: int
    num: int
    macro_f1: Interval
    accuracy: float
    log_loss: float
    calibration_error: float
    classes: dict[str, ClassReport]
    calibration: tuple[CalibrationBin, ...]
    baselines: dict[str, BaselineReport]
    by_symbol: dict[str, float]
    by_time: dict[int, float]


def macro_f1(labels: Labels, predicted: Labels) -> float:
    """Mean F1 of the three classes; one that is neither there nor guessed counts 0."""
    return float(_macro_f1(confusion(labels, predicted)))


def confusion(labels: Labels, predicted: Labels) -> Ints:
    """Counts, (3, 3): what was, by what was guessed; windows without a label are left out."""
    known = labels != UNKNOWN
    pairs = labels[known].astype(np.int64) * _NUM_CLASSES + predicted[known]
    return np.bincount(pairs, minlength=_NUM_CLASSES**2).reshape(_NUM_CLASSES, _NUM_CLASSES)


def evaluate(
    part: Part,
    scores: NDArray[np.float32],
    horizons: Sequence[int],
    baselines: Mapping[str, NDArray[np.int64]],
    *,
    seed: int = 0,
) -> tuple[HorizonReport, ...]:
    """Judges scores on a part.

    Args:
        scores: float32, (n, 3 H), probabilities in the order of ``score_names``.
        baselines: guesses, int64 (n, H), by name.
    """
    by_horizon = scores.astype(np.float64).reshape(len(part), -1, _NUM_CLASSES)
    symbols = part.tape.symbols_at(part.ends)
    times_us = part.tape.times_us[part.ends]
    return tuple(
        _judge(
            _Guesses(part.labels[:, column], by_horizon[:, column], symbols, times_us),
            {name: guesses[:, column] for name, guesses in baselines.items()},
            horizon,
            seed,
        )
        for column, horizon in enumerate(horizons)
    )


class _Guesses(NamedTuple):
    """One horizon's: int8 (n,), float64 (n, 3), names (n,), int64 (n,)."""

    labels: NDArray[np.int8]
    scores: Floats
    symbols: NDArray[np.str_]
    times_us: Ints


def _judge(
    given: _Guesses, baselines: Mapping[str, NDArray[np.int64]], horizon: int, seed: int
) -> HorizonReport:
    known = given.labels != UNKNOWN
    labels, scores, symbols, times_us = (values[known] for values in given)
    predicted = scores.argmax(axis=1)
    blocks = _Blocks(times_us, seed)
    of_model = blocks.macro_f1s(labels, predicted)
    whole = confusion(labels, predicted)
    calibration = _calibrate(labels, scores)
    ends = np.linspace(times_us.min(), times_us.max() + 1, _NUM_SLICES + 1)
    slices = {int(begin / 1e6): (times_us >= begin) & (times_us < end)
              for begin, end in pairwise(ends)}  # fmt: skip
    return HorizonReport(
        horizon=horizon,
        num=len(labels),
        macro_f1=_interval(float(_macro_f1(whole)), of_model),
        accuracy=float(whole.trace() / whole.sum()),
        log_loss=float(-np.log(np.clip(scores[np.arange(len(labels)), labels], 1e-12, 1)).mean()),
        calibration_error=sum(
            one.num * abs(one.confidence - one.accuracy) for one in calibration
        ) / len(labels),
        classes=_classes(whole),
        calibration=calibration,
        baselines={
            name: _compare(whole, of_model, confusion(labels, guesses[known]),
                           blocks.macro_f1s(labels, guesses[known]))
            for name, guesses in baselines.items()
        },
        by_symbol={
            str(symbol): macro_f1(labels[symbols == symbol], predicted[symbols == symbol])
            for symbol in np.unique(symbols)
        },
        by_time={
            begin: macro_f1(labels[those], predicted[those])
            for begin, those in slices.items()
            if those.any()
        },
    )  # fmt: skip


class _Blocks:
    """Blocks of event time, drawn with replacement, the same draws for every guess."""

    def __init__(self, times_us: Ints, seed: int) -> None:
        self._number = np.unique(times_us // int(BLOCK_S * 1e6), return_inverse=True)[1]
        self._num = int(self._number.max()) + 1
        chance = np.random.default_rng(seed)
        even = np.full(self._num, 1 / self._num)
        self._draws = chance.multinomial(self._num, even, size=_NUM_RESAMPLES)

    def macro_f1s(self, labels: Labels, predicted: Labels) -> Floats:
        """One of each resample."""
        cells = labels.astype(np.int64) * _NUM_CLASSES + predicted
        size = _NUM_CLASSES**2
        counts = np.bincount(self._number * size + cells, minlength=self._num * size)
        resampled = self._draws @ counts.reshape(self._num, size)
        return _macro_f1(resampled.reshape(-1, _NUM_CLASSES, _NUM_CLASSES))


def _macro_f1(confusions: Ints) -> Floats:
    """(..., 3, 3) to (...)."""
    hits = np.diagonal(confusions, axis1=-2, axis2=-1)
    sizes = confusions.sum(axis=-1) + confusions.sum(axis=-2)
    f1: Floats = (2 * hits / np.maximum(sizes, 1)).mean(axis=-1)
    return f1


def _interval(value: float, resampled: Floats) -> Interval:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(value=value, low=float(low), high=float(high))


def _compare(whole: Ints, of_model: Floats, other: Ints, of_other: Floats) -> BaselineReport:
    value = float(_macro_f1(other))
    return BaselineReport(
        macro_f1=_interval(value, of_other),
        model_ahead=_interval(float(_macro_f1(whole)) - value, of_model - of_other),
    )


def _classes(whole: Ints) -> dict[str, ClassReport]:
    reports = {}
    for kind, name in enumerate(CLASSES):
        hits, num, guessed = whole[kind, kind], whole[kind].sum(), whole[:, kind].sum()
        reports[name] = ClassReport(
            precision=float(hits / max(guessed, 1)),
            recall=float(hits / max(num, 1)),
            f1=float(2 * hits / max(num + guessed, 1)),
            num=int(num),
        )
    return reports


def _calibrate(labels: Labels, scores: Floats) -> tuple[CalibrationBin, ...]:
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == labels
    bins = np.minimum((confidence * _NUM_BINS).astype(int), _NUM_BINS - 1)
    return tuple(
        CalibrationBin(
            num=int(those.sum()),
            confidence=float(confidence[those].mean()),
            accuracy=float(right[those].mean()),
        )
        for those in (bins == number for number in range(_NUM_BINS))
        if those.any()
    )
