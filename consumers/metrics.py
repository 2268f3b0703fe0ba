"""What a worker counts, and every Prometheus metric of the stream side, once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from prometheus_client import Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector, CollectorRegistry

from consumers.assignments import StalledHead
from consumers.dedup import FirstSeenStatistics
from consumers.transactions import TransactionStatistics
from consumers.windows import WindowStatistics


@dataclass(slots=True)
class LaneCounts:
    """What became of a lane's records. Every live record ends in exactly one of the five ends.

    records = features + warm_up + thinned + duplicates + dead_letters + those still in flight.
    """

    records: int = 0  # polled, at or after the committed offset
    replayed: int = 0  # polled again to rebuild windows; owed nothing
    features: int = 0
    warm_up: int = 0  # the symbol's window was not full
    thinned: int = 0  # left out because the lane asks for a stride or a least interval
    duplicates: int = 0
    dead_letters: int = 0
    stale: int = 0  # features finished after the lane's deadline
    abandoned: int = 0  # in flight when the partition was taken away; their next owner's

    def __add__(self, other: "LaneCounts") -> "LaneCounts":
        names = [field.name for field in fields(self)]
        return LaneCounts(*(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def in_flight(self) -> int:
        """Records without an end yet."""
        ended = self.features + self.warm_up + self.thinned + self.duplicates
        return self.records - ended - self.dead_letters - self.abandoned


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """A snapshot of a worker.

    Attributes:
        lanes: counts since the start, by lane.
        batch_sizes: how many micro-batches had so many windows, rounded up to a power of two.
        queued: records waiting, by lane.
        transactions: by lane; empty unless delivery is ``exactly_once``.
        stalled: partitions whose oldest record is in flight for longer than ``stall_after_s``.
        num_undrained: partitions that were let go with work in flight, which is done again.
        num_tasks: asyncio's, in this process.
    """

    model_version: str
    lanes: Mapping[str, LaneCounts]
    queued: Mapping[str, int]
    batch_sizes: Mapping[int, int]
    num_partitions: int
    windows: WindowStatistics
    first_seen: FirstSeenStatistics
    transactions: Mapping[str, TransactionStatistics]
    stalled: Sequence[StalledHead]
    num_undrained: int
    num_tasks: int


_LATENCY_BUCKETS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.08, 0.1, 0.2, 0.5, 1, 2, 5, 30)


def latency_histogram(registry: CollectorRegistry) -> Histogram:
    """``tapeline_latency_seconds``: from the event's append to its feature's acknowledgement."""
    return Histogram(
        "tapeline_latency_seconds",
        "From the append of an event to the acknowledgement of its feature.",
        ["lane"],
        buckets=_LATENCY_BUCKETS_S,
        registry=registry,
    )


class WorkerCollector(Collector):
    """Turns a worker's statistics into metrics when Prometheus asks; costs nothing otherwise."""

    def __init__(self, statistics: Callable[[], WorkerStatistics]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Metric]:
        now = self._statistics()
        records = CounterMetricFamily(
            "tapeline_records", "Records by what became of them.", labels=["lane", "outcome"]
        )
        queued = GaugeMetricFamily("tapeline_queued_records", "Records waiting.", labels=["lane"])
        for lane, counts in now.lanes.items():
            for field in fields(LaneCounts):
                records.add_metric([lane, field.name], getattr(counts, field.name))
            queued.add_metric([lane], now.queued[lane])
        yield records
        yield queued
        yield GaugeMetricFamily(
            "tapeline_assigned_partitions", "Partitions of this worker.", now.num_partitions
        )
        yield from _delivery_metrics(now)
        yield GaugeMetricFamily(
            "tapeline_symbols", "Symbols with a window.", now.windows.num_symbols
        )
        yield GaugeMetricFamily(
            "tapeline_windows_bytes", "Memory of windows.", now.windows.allocated_bytes
        )
        yield GaugeMetricFamily(
            "tapeline_first_seen_degraded",
            "1 while Redis does not answer and duplicates are known to this worker alone.",
            now.first_seen.degraded,
        )


def _delivery_metrics(now: WorkerStatistics) -> Iterator[Metric]:
    transactions = CounterMetricFamily(
        "tapeline_transactions", "Transactions by how they ended.", labels=["lane", "outcome"]
    )
    for lane, counts in now.transactions.items():
        transactions.add_metric([lane, "committed"], counts.committed_total)
        transactions.add_metric([lane, "aborted"], counts.aborted_total)
    yield transactions
    stalled = GaugeMetricFamily(
        "tapeline_stalled_seconds",
        "Age of a partition's oldest record in flight, where it is past worker.stall_after_s.",
        labels=["topic", "partition"],
    )
    for head in now.stalled:
        topic, number = head.partition
        stalled.add_metric([topic, str(number)], head.age_s)
    yield stalled
    yield CounterMetricFamily(
        "tapeline_undrained_partitions",
        "Partitions let go with work in flight; their next owner does it again.",
        now.num_undrained,
    )
    yield GaugeMetricFamily("tapeline_tasks", "Tasks of the worker's event loop.", now.num_tasks)
