"""What the worker asked of the model, and how it was answered."""

from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from consumers.budget import LATENCY_EDGES_S
from schemas.histogram import Histogram


class RequestMeter:
    """Counts windows by lane: asked about, answered and how fast, in vain.

    asked = answered + failed + on their way. An answer from the cache is one, too.
    """

    def __init__(self, lanes: Sequence[str]) -> None:
        self._asked = dict.fromkeys(lanes, 0)
        self._failed = dict.fromkeys(lanes, 0)
        self._latency = {lane: Histogram(LATENCY_EDGES_S) for lane in lanes}

    def asked(self, lanes: Counter[str]) -> None:
        for lane, num_windows in lanes.items():
            self._asked[lane] += num_windows

    def ended(self, lanes: Counter[str], failed: Counter[str], seconds: float) -> None:
        """All of a micro-batch, after so long.

        Args:
            failed: those of them that got no features.
        """
        for lane, num_windows in lanes.items():
            self._failed[lane] += failed[lane]
            self._latency[lane].observe_one(seconds, num_windows - failed[lane])

    def collect(self) -> Iterator[Metric]:
        asked = CounterMetricFamily(
            "cnn_lstm_prediction_requests", "Windows that features were asked for.", labels=["lane"]
        )
        failed = CounterMetricFamily(
            "cnn_lstm_prediction_errors", "Those of them that got none.", labels=["lane"]
        )
        latency = HistogramMetricFamily(
            "cnn_lstm_prediction_latency_seconds",
            "From the question to the answer, as the worker sees it: the way there and back, "
            "retries and the cache included.",
            labels=["lane"],
        )
        for lane in self._asked:
            asked.add_metric([lane], self._asked[lane])
            failed.add_metric([lane], self._failed[lane])
            latency.add_metric([lane], self._latency[lane].buckets(), self._latency[lane].sum)
        yield from (asked, failed, latency)
