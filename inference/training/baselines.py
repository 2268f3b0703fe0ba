"""What a model must beat to be worth its time: guesses that know hardly anything."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from inference.training.labels import CLASSES, UNKNOWN, directions, past_moves_bps
from inference.training.tape import Floats, Part
from schemas.errors import ConfigError

_IMBALANCE = {"market50-v1": slice(43, 46)}
"""Channels with the book's imbalance at 1, 5 and 10 levels, by channel set (docs/channels.md)."""
_MAX_FITTED = 200_000  # windows; nine coefficients need no more
_NEVER = -1e9  # the intercept of a class that training did not have


class LinearScores(BaseModel):
    """The largest of ``values @ coefficients.T + intercepts`` is the guess."""

    model_config = ConfigDict(frozen=True)

    coefficients: tuple[tuple[float, ...], ...]
    intercepts: tuple[float, ...]

    def guess(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        scores = values @ np.array(self.coefficients).T + np.array(self.intercepts)
        guesses: NDArray[np.int64] = scores.argmax(axis=1)
        return guesses


class Baselines(BaseModel):
    """Fitted to a training part, so that they can be asked about any other.

    Attributes:
        majority: the class that is most frequent in training, of each horizon.
        imbalance: a logistic regression on the book's imbalance in the newest row, classes weighed
            alike, of each horizon; empty where the channel set has no imbalance.
    """

    model_config = ConfigDict(frozen=True)

    majority: tuple[int, ...]
    imbalance: tuple[LinearScores, ...]

    def guesses(
        self, part: Part, horizons: Sequence[int], thresholds: Sequence[float], channels: str
    ) -> dict[str, NDArray[np.int64]]:
        """For the windows of a part, (n, H), by name.

        ``last_move``: the smoothed move of the last ``k`` events goes on; where mids are known.
        """
        found = {"majority": np.tile(np.array(self.majority, np.int64), (len(part), 1))}
        if thresholds:
            moves = past_moves_bps(part.tape, horizons)[part.ends]
            found["last_move"] = directions(moves, thresholds).astype(np.int64)
        if self.imbalance:
            values = part.tape.rows[part.ends, _IMBALANCE[channels]]
            found["imbalance"] = np.stack([one.guess(values) for one in self.imbalance], axis=1)
        return found


def fit_baselines(train: Part, channels_version: str) -> Baselines:
    """Raises ConfigError without scikit-learn."""
    columns = [column[column != UNKNOWN] for column in train.labels.T]
    return Baselines(
        majority=tuple(int(np.bincount(column).argmax()) for column in columns),
        imbalance=_fit_imbalance(train, channels_version) if channels_version in _IMBALANCE else (),
    )


def _fit_imbalance(train: Part, channels_version: str) -> tuple[LinearScores, ...]:
    fitted = train.every(-(-len(train) // _MAX_FITTED))
    values = fitted.tape.rows[fitted.ends, _IMBALANCE[channels_version]].astype(np.float64)
    return tuple(
        _fit_linear(values[labels != UNKNOWN], labels[labels != UNKNOWN])
        for labels in fitted.labels.T
    )


def _fit_linear(values: Floats, labels: NDArray[np.int8]) -> LinearScores:
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ConfigError(
            "the imbalance baseline needs scikit-learn; install it with "
            "`pip install 'tapeline[train]'`"
        ) from error
    coefficients = np.zeros((len(CLASSES), values.shape[1]))
    intercepts = np.full(len(CLASSES), _NEVER)
    present = np.unique(labels)
    intercepts[present] = 0
    if len(present) > 1:
        model = LogisticRegression(class_weight="balanced").fit(values, labels)
        weighed = present[-len(model.coef_) :]  # of two classes sklearn weighs the second alone
        coefficients[weighed], intercepts[weighed] = model.coef_, model.intercept_
    return LinearScores(
        coefficients=tuple(map(tuple, coefficients.tolist())), intercepts=tuple(intercepts.tolist())
    )
