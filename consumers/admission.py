"""When a micro-batch is filled: just in time for the model. Sans-IO."""

import heapq
import math
from dataclasses import dataclass

from consumers.service_times import ServiceTimes

_LEAD = 1.5  # times what preparing is expected to take: the model should not wait for it


@dataclass(slots=True, eq=False)
class Call:
    """A micro-batch at the model; ``started_s`` is None while it waits there for another."""

    num_windows: int
    started_s: float | None


class Admission:
    """Says how long a free slot may wait before it is filled.

    While the model is busy, a micro-batch filled at once would only wait in front of it, and a
    record that comes meanwhile would wait for the next one. So it is filled when the model is
    expected to be free in the time that preparing takes. A model that is free is not waited for,
    but where micro-batches would follow each other closely their number is bounded: each has a cost
    of its own, which a few records do not bear.

    Args:
        service_times: what calls are expected to take.
        num_replicas: calls that the model works on at once; the others wait in order.
        interval_s: least time from one micro-batch to the next.
    """

    def __init__(
        self, service_times: ServiceTimes, num_replicas: int = 1, *, interval_s: float = 0.0
    ) -> None:
        self._service_times = service_times
        self._prepare_times = ServiceTimes()
        self._num_replicas = num_replicas
        self._interval_s = interval_s
        self._begun_s = -math.inf
        self._calls: list[Call] = []

    @property
    def num_calls(self) -> int:
        """Micro-batches at the model, at work or waiting."""
        return len(self._calls)

    def share(self, num_replicas: int) -> None:
        """So many replicas from now on, for this and for the service times."""
        self._num_replicas = num_replicas
        self._service_times.share(num_replicas)

    def begin(self, num_windows: int, now_s: float) -> Call:
        """Notes a call, on any clock that only goes forward; ``end`` it whatever becomes of it."""
        call = Call(num_windows, now_s if len(self._calls) < self._num_replicas else None)
        self._calls.append(call)
        return call

    def end(self, call: Call, now_s: float) -> None:
        self._calls.remove(call)
        for running in self._calls[: self._num_replicas]:
            if running.started_s is None:
                running.started_s = now_s

    def prepared(self, num_records: int, begun_s: float, ended_s: float) -> None:
        """Notes what preparing a micro-batch took."""
        self._begun_s = begun_s
        self._prepare_times.observe(num_records, begun_s, ended_s)

    def too_soon_s(self, now_s: float) -> float:
        """How long the next micro-batch has to wait for its interval; 0: not at all."""
        return max(0.0, self._begun_s + self._interval_s - now_s)

    def wait_s(self, num_records: int, now_s: float) -> float:
        """How long filling a micro-batch of so many records may wait; 0: not at all."""
        lead_s = _LEAD * self._prepare_times.predict(num_records)
        return max(0.0, self._free_in_s(now_s) - lead_s)

    def _free_in_s(self, now_s: float) -> float:
        if len(self._calls) < self._num_replicas:
            return 0.0
        ends_s = [
            max(0.0, call.started_s + self._service_times.predict(call.num_windows) - now_s)
            for call in self._calls
            if call.started_s is not None
        ]
        heapq.heapify(ends_s)
        for call in self._calls:
            if call.started_s is None:
                end_s = ends_s[0] + self._service_times.predict(call.num_windows)
                heapq.heapreplace(ends_s, end_s)
        return ends_s[0]
