"""How far behind the workers are, in records and in seconds, for Prometheus."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import structlog
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from schemas.errors import TapelineError
from schemas.settings import Settings
from tapeline.lag import LagReader, PartitionLag

_LOOK_EVERY_S = 5.0
_JOIN_S = 2.0
_MAX_ENDS = 720  # an hour of looks
_log = structlog.get_logger(__name__)


class LagClock:
    """Turns offsets, look by look, into seconds: since when the next record to be done has been
    in its topic. Sans-IO.

    The broker does not say when an offset was written, but each look says how far the topic was.
    Between two looks the offsets are taken as evenly spread; a record older than the first look is
    as old as that.
    """

    def __init__(self) -> None:
        self._ends: dict[tuple[str, int], deque[tuple[int, float]]] = {}

    def look(self, lags: Sequence[PartitionLag], at_s: float) -> dict[str, tuple[int, float]]:
        """Each lane's lag in records and, of its partition that is furthest behind, in seconds."""
        lanes: dict[str, tuple[int, float]] = {}
        for one in lags:
            ends = self._ends.setdefault((one.topic, one.partition), deque(maxlen=_MAX_ENDS))
            if ends and one.end < ends[-1][0]:  # the topic was made anew
                ends.clear()
            if not ends or one.end > ends[-1][0]:
                ends.append((one.end, at_s))
            seconds = at_s - _written_s(ends, one.end - one.lag) if one.lag else 0.0
            records, longest_s = lanes.get(one.lane, (0, 0.0))
            lanes[one.lane] = (records + one.lag, max(longest_s, seconds))
        return lanes


def _written_s(ends: deque[tuple[int, float]], offset: int) -> float:
    """About when the record at this offset was written."""
    earlier = ends[0]
    for later in ends:
        if later[0] > offset:
            break
        earlier = later
    (end, at_s), (later_end, later_s) = earlier, later
    if later_end == end or offset < end:
        return at_s
    return at_s + (later_s - at_s) * (offset - end) / (later_end - end)


class LagCollector(Collector):
    """The lanes' lag, looked at by a thread every five seconds; close it.

    While the broker does not answer, the lag is left out rather than said as it was, and
    ``tapeline_lag_errors_total`` grows.
    """

    def __init__(
        self, settings: Settings, connect: Callable[[Settings], LagReader] = LagReader
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._lanes: dict[str, tuple[int, float]] = {}
        self._num_errors = 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lag", daemon=True)
        self._thread.start()

    def collect(self) -> Iterator[Metric]:
        records = GaugeMetricFamily(
            "tapeline_lag_records", "Records that are in a lane's topic and not yet done.",
            labels=["lane"],
        )  # fmt: skip
        seconds = GaugeMetricFamily(
            "tapeline_lag_seconds",
            "How long the next record to be done has been in its topic, at the furthest behind.",
            labels=["lane"],
        )
        for lane, (num_records, lag_s) in self._lanes.items():
            records.add_metric([lane], num_records)
            seconds.add_metric([lane], lag_s)
        yield from (records, seconds)
        yield CounterMetricFamily(
            "tapeline_lag_errors", "Looks at the lag that the broker did not answer.",
            self._num_errors,
        )  # fmt: skip

    def close(self) -> None:
        self._closing.set()
        self._thread.join(_JOIN_S)  # it may be asking a broker that is away

    def _run(self) -> None:
        clock = LagClock()
        while not self._closing.is_set():
            try:
                with closing(self._connect(self._settings)) as reader:
                    while not self._closing.is_set():
                        self._lanes = clock.look(reader.read(), time.monotonic())
                        self._closing.wait(_LOOK_EVERY_S)
            except TapelineError as error:
                self._lanes = {}
                self._num_errors += 1
                _log.warning("lag_unknown", error=str(error))
                self._closing.wait(_LOOK_EVERY_S)
