"""How long the model takes for a micro-batch, learned while it works. Sans-IO."""

import statistics
from collections import deque
from collections.abc import Mapping

SMALLEST_BUCKET = 4
_NUM_SAMPLES = 31  # of a bucket: its median holds until half of them are wrong
_FORGET_AFTER_S = 60.0


def bucket_of(num_windows: int) -> int:
    """The power of two, from 4 on, that holds so many windows: what the engine pads them to."""
    return max(SMALLEST_BUCKET, 1 << (num_windows - 1).bit_length())


class ServiceTimes:
    """The model's time by batch bucket, fitted online: the median of each bucket's last calls.

    A bucket not seen within a minute is estimated by what the engine measured at its start, plus
    what calls of the nearest bucket take beyond that (the way there and back). An estimate never
    falls as the bucket grows.

    A call that began while the model was busy with earlier ones has waited for them: its time
    counts from when the model became free.

    Args:
        num_replicas: calls that the model works on at once.
    """

    def __init__(self, num_replicas: int = 1) -> None:
        self._ended_s: deque[float] = deque(maxlen=num_replicas)  # of the last calls
        self._measured_s: dict[int, float] = {}
        self._samples: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._seen_s: dict[int, float] = {}
        self._estimates: dict[int, float] = {}

    def share(self, num_replicas: int) -> None:
        """So many replicas from now on."""
        self._ended_s = deque(self._ended_s, maxlen=num_replicas)

    def expect(self, measured_s: Mapping[int, float]) -> None:
        """Takes seconds by bucket as the engine measured them.

        Where there are none, a bucket is taken to be as fast as the next smaller one, until it is
        tried.
        """
        self._measured_s = dict(sorted(measured_s.items()))
        self._estimates.clear()

    def observe(self, num_windows: int, begun_s: float, ended_s: float) -> None:
        """Notes a call, on any clock that only goes forward. Calls are noted as they end."""
        assert num_windows > 0
        assert begun_s <= ended_s
        is_full = len(self._ended_s) == self._ended_s.maxlen
        free_s = self._ended_s[0] if is_full else begun_s
        self._ended_s.append(ended_s)
        self._note(bucket_of(num_windows), ended_s - max(begun_s, free_s), ended_s)

    def _note(self, bucket: int, seconds: float, now_s: float) -> None:
        samples = self._samples.setdefault(bucket, deque(maxlen=_NUM_SAMPLES))
        samples.append(seconds)
        self._medians[bucket] = statistics.median(samples)
        self._seen_s[bucket] = now_s
        for other, seen_s in list(self._seen_s.items()):
            if now_s - seen_s > _FORGET_AFTER_S:
                del self._samples[other], self._medians[other], self._seen_s[other]
        self._estimates.clear()

    def predict(self, num_windows: int) -> float:
        """Seconds that a call of so many windows takes; 0 while nothing is known."""
        bucket = bucket_of(num_windows)
        if bucket not in self._estimates:
            floor_s = self.predict(bucket // 2) if bucket > SMALLEST_BUCKET else 0.0
            self._estimates[bucket] = max(self._estimate(bucket), floor_s)
        return self._estimates[bucket]

    def table(self) -> dict[int, float]:
        """The estimate of each bucket that was measured or seen, in seconds."""
        return {bucket: self.predict(bucket) for bucket in self._known()}

    def _known(self) -> list[int]:
        return sorted({*self._measured_s, *self._medians})

    def _estimate(self, bucket: int) -> float:
        if bucket in self._medians:
            return self._medians[bucket]
        measured_s = self._measured(bucket)
        if not self._medians:
            return measured_s
        nearest = min(self._medians, key=lambda seen: abs(seen.bit_length() - bucket.bit_length()))
        beyond_s = self._medians[nearest] - self._measured(nearest)
        return max(measured_s + beyond_s, 0.0) if self._measured_s else self._unmeasured(bucket)

    def _measured(self, bucket: int) -> float:
        """The engine's own figure, of the largest bucket up to this one if it has none for it."""
        sizes = [size for size in self._measured_s if size <= bucket] or list(self._measured_s)[:1]
        return self._measured_s[sizes[-1]] if sizes else 0.0

    def _unmeasured(self, bucket: int) -> float:
        smaller = [size for size in self._medians if size <= bucket]
        return self._medians[max(smaller)] if smaller else self._medians[min(self._medians)]
