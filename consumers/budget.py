"""The latency budget: where the time of an event went, stage by stage."""

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import HistogramMetricFamily

from consumers.items import appended_us_of, polled_us_of
from consumers.records import Record
from schemas.histogram import Histogram
from schemas.timing import STAGES, TIMING_HEADER, encode_timing

LATENCY_EDGES_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.08, 0.1, 0.2, 0.5, 1, 2, 5, 30)
_FOLD_AT = 64  # parcels


class BatchTimes(NamedTuple):
    """When a micro-batch passed from one stage to the next; Unix epoch, microseconds."""

    taken_us: int
    given_us: int
    answered_us: int


class LatencyBudget:
    """Histograms by lane of every stage and of the whole, over the features of one worker.

    What is observed waits until there is enough of it, or until somebody asks: counted parcel by
    parcel it took 6 % of the event loop's time at 500 events/s.
    """

    def __init__(self, lanes: Sequence[str]) -> None:
        self._stages = {
            (lane, stage): Histogram(LATENCY_EDGES_S) for lane in lanes for stage in STAGES
        }
        self._whole = {lane: Histogram(LATENCY_EDGES_S) for lane in lanes}
        self._waiting: dict[str, list[NDArray[np.int64]]] = {lane: [] for lane in lanes}
        self._lock = threading.Lock()  # the loop observes, a scrape's thread collects

    def observe(
        self, lane: str, records: Sequence[Record], times: BatchTimes, durable_us: int
    ) -> None:
        """Counts records of a micro-batch whose features are durable since ``durable_us``."""
        with self._lock:
            passed = np.empty((len(records), 2 + len(times) + 1), np.int64)
            passed[:, 0] = list(map(appended_us_of, records))
            passed[:, 1] = list(map(polled_us_of, records))
            passed[:, 2:] = (*times, durable_us)
            waiting = self._waiting[lane]
            waiting.append(passed)
            if len(waiting) >= _FOLD_AT:
                self._fold(lane)

    def _fold(self, lane: str) -> None:
        if not (waiting := self._waiting[lane]):
            return
        passed = np.concatenate(waiting)
        waiting.clear()
        for stage, seconds in zip(STAGES, (np.diff(passed) / 1e6).T, strict=True):
            self._stages[lane, stage].observe(seconds)
        self._whole[lane].observe((passed[:, -1] - passed[:, 0]) / 1e6)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """``tapeline_latency_seconds`` by lane, ``tapeline_stage_seconds`` by lane and stage."""
        with self._lock:
            for lane in self._waiting:
                self._fold(lane)
        whole = HistogramMetricFamily(
            "tapeline_latency_seconds",
            "From the append of an event to the acknowledgement of its feature.",
            labels=["lane"],
        )
        for lane, histogram in self._whole.items():
            whole.add_metric([lane], histogram.buckets(), histogram.sum)
        yield whole
        by_stage = HistogramMetricFamily(
            "tapeline_stage_seconds",
            "The same by stage: broker, queue, batch, model, publish.",
            labels=["lane", "stage"],
        )
        for labels, histogram in self._stages.items():
            by_stage.add_metric(labels, histogram.buckets(), histogram.sum)
        yield by_stage


def timing_header(record: Record, times: BatchTimes) -> tuple[str, bytes]:
    """Where a record's time went, up to the model's answer."""
    passed = [record.appended_us, record.polled_us, *times]
    stages = zip(STAGES[:-1], passed[:-1], passed[1:], strict=True)
    return TIMING_HEADER, encode_timing(
        {stage: (ended - begun) / 1000 for stage, begun, ended in stages}
    )
