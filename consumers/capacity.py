"""What one worker could do, learned from what it does. Sans-IO."""

from collections.abc import Mapping

from inference.client import best_rate

_MIN_RECORDS = 200  # fewer say nothing
_WEIGHT = 0.3  # of the newest sample


class CapacityMeter:
    """Events a second, were a core its own: records done by second of processor time.

    Also no more than the model's answers allow: so many micro-batches may be with it at once.
    """

    def __init__(self) -> None:
        self._records = 0
        self._cpu_s = 0.0
        self._per_s: float | None = None

    def observe(self, num_records: int, cpu_s: float) -> None:
        """Takes totals since the start; those that grew little wait for more."""
        done, spent_s = num_records - self._records, cpu_s - self._cpu_s
        if done < _MIN_RECORDS or spent_s <= 0:
            return
        self._records, self._cpu_s = num_records, cpu_s
        sample = done / spent_s
        before = self._per_s
        self._per_s = sample if before is None else before + _WEIGHT * (sample - before)

    def per_s(self, *, in_flight: int, service_s: Mapping[int, float]) -> float | None:
        """The estimate; None while nothing is known.

        Args:
            in_flight: micro-batches that may be with the model at once.
            service_s: seconds that the model takes, by batch bucket.
        """
        if self._per_s is None:
            return None
        best = best_rate(service_s)
        return min(self._per_s, in_flight * best) if best else self._per_s
