"""Whether what a model meets still looks like what it was trained on.

The population stability index, sum (p - q) ln(p / q) over bins that held a tenth of the training
values each. By custom below 0.1 nothing has changed, above 0.25 much has (Siddiqi, 2006).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

NOTABLE, LARGE = 0.1, 0.25
_NUM_BINS = 10
_SMALLEST_SHARE = 1e-4  # an empty bin would give infinity


class Distribution(BaseModel):
    """How one column's values were spread.

    Attributes:
        edges: between the bins, rising; fewer than nine where values repeat.
        shares: of each bin, one more than edges; they add up to 1.
    """

    model_config = ConfigDict(frozen=True)

    edges: tuple[float, ...]
    shares: tuple[float, ...]


def distributions(values: NDArray[np.float32]) -> tuple[Distribution, ...]:
    """Of each column of (n, K) values."""
    places = np.arange(1, _NUM_BINS) / _NUM_BINS
    return tuple(_distribution(column, np.unique(np.quantile(column, places)))
                 for column in values.T)  # fmt: skip


def drifts(before: Sequence[Distribution], now: NDArray[np.float32]) -> NDArray[np.float64]:
    """The index of each column of (n, K) values against what was before: float64 (K,)."""
    return np.array(
        [
            _index(one.shares, _distribution(column, np.array(one.edges)).shares)
            for one, column in zip(before, now.T, strict=True)
        ]
    )


def _distribution(column: NDArray[np.float32], edges: NDArray[np.float64]) -> Distribution:
    # A bin ends with its edge, so that a value that is often there is the last of its bin.
    bins = np.searchsorted(edges, column.astype(np.float64), side="left")
    shares = np.bincount(bins, minlength=len(edges) + 1) / len(column)
    return Distribution(edges=tuple(edges.tolist()), shares=tuple(shares.tolist()))


def _index(before: Sequence[float], now: Sequence[float]) -> float:
    p, q = (np.maximum(shares, _SMALLEST_SHARE) for shares in (before, now))
    return float(((q - p) * np.log(q / p)).sum())
