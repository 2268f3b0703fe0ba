"""Every Prometheus metric of the model side, once."""

from collections.abc import Callable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from inference.engine import EngineStatistics
from schemas.histogram import Histogram

_SIZES = tuple(1 << power for power in range(0, 17, 2))
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)


class CallMeter:
    """The micro-batches that a process's model did: how large, and how long it took."""

    def __init__(self) -> None:
        self.sizes = Histogram(_SIZES)
        self.seconds = Histogram(_SECONDS)

    def observe(self, num_windows: int, seconds: float) -> None:
        self.sizes.observe_one(num_windows)
        self.seconds.observe_one(seconds)


class ModelCollector(Collector):
    """Turns what a model did into metrics when Prometheus asks.

    Args:
        statistics: of the version that serves.
    """

    def __init__(self, statistics: Callable[[], EngineStatistics], calls: CallMeter) -> None:
        self._statistics = statistics
        self._calls = calls

    def collect(self) -> Iterator[Metric]:
        sizes = HistogramMetricFamily("cnn_lstm_batch_size", "Windows in a micro-batch.", labels=[])
        sizes.add_metric([], self._calls.sizes.buckets(), self._calls.sizes.sum)
        yield sizes
        seconds = HistogramMetricFamily(
            "cnn_lstm_batch_processing_time_seconds",
            "What the model took for a micro-batch, copies to and from the GPU included.",
            labels=[],
        )
        seconds.add_metric([], self._calls.seconds.buckets(), self._calls.seconds.sum)
        yield seconds
        now = self._statistics()
        yield CounterMetricFamily(
            "tapeline_padded_rows",
            "Rows computed for nothing, to fill a batch shape, since this version was loaded.",
            now.num_padded_rows,
        )
        yield CounterMetricFamily(
            "tapeline_model_out_of_memory",
            "Batch shapes given up for want of memory, since this version was loaded.",
            now.num_out_of_memory,
        )
        serving = GaugeMetricFamily(
            "tapeline_serving_model", "1 for what serves here.", labels=["model_version", "device"]
        )
        serving.add_metric([now.model_version, now.device], 1)
        yield serving
