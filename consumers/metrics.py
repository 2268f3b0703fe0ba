"""What a worker counts, and every Prometheus metric of the stream side, once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from consumers.assignments import StalledHead
from consumers.budget import LatencyBudget
from consumers.dedup import FirstSeenStatistics
from consumers.guard import GuardStatistics
from consumers.poller import PollerStatistics
from consumers.requests import RequestMeter
from consumers.rollout import RolloutStatistics
from consumers.shadow import ShadowStatistics
from consumers.transactions import TransactionStatistics
from consumers.windows import WindowStatistics
from inference.cache import CacheStatistics


@dataclass(slots=True)
class LaneCounts:
    """What became of a lane's records. Every live record ends in exactly one of these ends.

    records = features + warm_up + skipped + thinned + duplicates + dead_letters + in flight.
    """

    records: int = 0  # polled, at or after the committed offset
    replayed: int = 0  # polled again to rebuild windows; owed nothing
    features: int = 0
    warm_up: int = 0  # the symbol's window was not full
    skipped: int = 0  # past the deadline of a lane that says so; in their windows all the same
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
        ended = self.features + self.warm_up + self.skipped + self.thinned + self.duplicates
        return self.records - ended - self.dead_letters - self.abandoned


@dataclass(frozen=True, slots=True)
class WorkerStatistics:
    """A snapshot of a worker.

    Attributes:
        lanes: counts since the start, by lane.
        batch_sizes: how many micro-batches had so many windows, rounded up to a power of two.
        service_s: seconds that the model takes for a micro-batch, by bucket, as learned.
        scheduled: records given to micro-batches, by lane.
        guard: what is in use of the machine, and what the worker does without because of it.
        queued: records waiting, by lane.
        pollers: by lane.
        letters: dead letters by lane and reason.
        transactions: by lane; empty unless delivery is ``exactly_once``.
        stalled: partitions whose oldest record is in flight for longer than ``stall_after_s``.
        num_undrained: partitions that were let go with work in flight, which is done again.
        num_tasks: asyncio's, in this process.
    """

    model_version: str
    lanes: Mapping[str, LaneCounts]
    queued: Mapping[str, int]
    batch_sizes: Mapping[int, int]
    service_s: Mapping[int, float]
    scheduled: Mapping[str, int]
    guard: GuardStatistics
    num_partitions: int
    windows: WindowStatistics
    first_seen: FirstSeenStatistics
    cache: CacheStatistics
    rollout: RolloutStatistics
    shadow: ShadowStatistics
    transactions: Mapping[str, TransactionStatistics]
    pollers: Mapping[str, PollerStatistics]
    letters: Mapping[tuple[str, str], int]
    stalled: Sequence[StalledHead]
    num_undrained: int
    num_tasks: int


class WorkerCollector(Collector):
    """Turns a worker's statistics into metrics when Prometheus asks; costs nothing otherwise."""

    def __init__(
        self,
        statistics: Callable[[], WorkerStatistics],
        budget: LatencyBudget,
        requests: RequestMeter,
    ) -> None:
        self._statistics = statistics
        self._budget = budget
        self._requests = requests

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
        yield from _flow_metrics(now)
        yield from self._budget.collect()
        yield from self._requests.collect()
        yield from _scheduler_metrics(now)
        yield from _guard_metrics(now)
        yield GaugeMetricFamily(
            "tapeline_assigned_partitions", "Partitions of this worker.", now.num_partitions
        )
        yield from _delivery_metrics(now)
        yield from _cache_metrics(now.cache)
        yield from _rollout_metrics(now)
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


def _flow_metrics(now: WorkerStatistics) -> Iterator[Metric]:
    in_flight = GaugeMetricFamily(
        "tapeline_in_flight_records", "Records polled, without an end yet.", labels=["lane"]
    )
    for lane, counts in now.lanes.items():
        in_flight.add_metric([lane], counts.in_flight)
    yield in_flight
    letters = CounterMetricFamily(
        "tapeline_dead_letters", "Dead letters by why.", labels=["lane", "reason"]
    )
    for labels, num_letters in now.letters.items():
        letters.add_metric(labels, num_letters)
    yield letters
    paused = GaugeMetricFamily(
        "tapeline_paused", "1 while a lane's queue is full and the rest waits in its topic.",
        labels=["lane"],
    )  # fmt: skip
    rebalances = CounterMetricFamily(
        "tapeline_rebalanced_partitions",
        "Partitions that rebalances gave and took: assigned, revoked, lost.",
        labels=["lane", "how"],
    )
    commits = SummaryMetricFamily(
        "tapeline_commit_seconds",
        "Until the broker has taken a commit; of exactly_once, a whole transaction.",
        labels=["lane"],
    )
    for lane, poller in now.pollers.items():
        paused.add_metric([lane], poller.paused)
        for how, num_partitions in (
            ("assigned", poller.num_assigned),
            ("revoked", poller.num_revoked),
            ("lost", poller.num_lost),
        ):
            rebalances.add_metric([lane, how], num_partitions)
        if transactions := now.transactions.get(lane):
            commits.add_metric([lane], transactions.committed_total, transactions.committed_s)
        else:
            commits.add_metric([lane], poller.num_commits, poller.commit_s)
    yield from (paused, rebalances, commits)


def _scheduler_metrics(now: WorkerStatistics) -> Iterator[Metric]:
    scheduled = CounterMetricFamily(
        "tapeline_scheduled_records", "Records given to micro-batches.", labels=["lane"]
    )
    for lane, num_records in now.scheduled.items():
        scheduled.add_metric([lane], num_records)
    yield scheduled
    service = GaugeMetricFamily(
        "tapeline_service_seconds",
        "What the model takes for a micro-batch, by batch bucket, as learned.",
        labels=["bucket"],
    )
    for bucket, seconds in now.service_s.items():
        service.add_metric([str(bucket)], seconds)
    yield service


def _guard_metrics(now: WorkerStatistics) -> Iterator[Metric]:
    guard = now.guard
    used = GaugeMetricFamily(
        "tapeline_resource_used_ratio",
        "What is in use of a resource, at the guard's last look.",
        labels=["resource"],
    )
    for resource, fraction in guard.usage._asdict().items() if guard.usage else ():
        if fraction is not None:
            used.add_metric([resource], fraction)
    yield used
    yield CounterMetricFamily(
        "tapeline_guard_looks", "Looks at what is in use of the machine.", guard.num_looks
    )
    steps = CounterMetricFamily(
        "tapeline_guard_steps",
        "Steps that the guard took, by the resource that asked for them.",
        labels=["resource", "step"],
    )
    for (resource, step), num_steps in guard.steps.items():
        steps.add_metric([resource, step], num_steps)
    yield steps
    yield GaugeMetricFamily(
        "tapeline_guard_halvings", "How often the largest micro-batch is halved now.",
        guard.restraint.shrunk_by,
    )  # fmt: skip
    held = GaugeMetricFamily(
        "tapeline_lane_held", "1 while a lane gets its reserved share alone.", labels=["lane"]
    )
    for lane in now.lanes:
        held.add_metric([lane], lane in guard.restraint.held)
    yield held


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


def _cache_metrics(cache: CacheStatistics) -> Iterator[Metric]:
    hits = CounterMetricFamily(
        "cnn_lstm_cache_hits", "Windows whose features were known, by where.", labels=["where"]
    )
    hits.add_metric(["memory"], cache.memory_hits)
    hits.add_metric(["redis"], cache.redis_hits)
    yield hits
    yield CounterMetricFamily(
        "cnn_lstm_cache_misses", "Windows whose features were not known.", cache.misses
    )
    faults = CounterMetricFamily(
        "tapeline_cache_faults",
        "Windows by what was wrong: stale, rejected, error, mismatch.",
        labels=["fault"],
    )
    for fault, num_windows in (
        ("stale", cache.stale),
        ("rejected", cache.rejected),
        ("error", cache.errors),
        ("mismatch", cache.mismatches),
    ):
        faults.add_metric([fault], num_windows)
    yield faults
    yield GaugeMetricFamily("tapeline_cache_bytes", "Memory of the cache.", cache.num_bytes)


def _rollout_metrics(now: WorkerStatistics) -> Iterator[Metric]:
    roles = {"serving": now.model_version or None}
    if rollout := now.rollout.rollout:
        roles |= {"canary": rollout.canary, "shadow": rollout.shadow}
    versions = GaugeMetricFamily(
        "tapeline_model_version", "1 for each version in use.", labels=["role", "model_version"]
    )
    for role, version in roles.items():
        if version:
            versions.add_metric([role, version], 1)
    yield versions
    yield CounterMetricFamily(
        "tapeline_rollout_changes", "Times that this worker took other versions.",
        now.rollout.num_changes,
    )  # fmt: skip
    yield CounterMetricFamily(
        "tapeline_rollout_refusals",
        "Times that what the model store asks for could not be served.",
        now.rollout.num_refused,
    )
    shadow = now.shadow
    windows = CounterMetricFamily(
        "tapeline_shadow_windows", "A shadow's windows by what became of them.", labels=["outcome"]
    )
    for outcome, num_windows in (
        ("compared", shadow.num_windows),
        ("skipped", shadow.num_skipped),
        ("failed", shadow.num_failed),
    ):
        windows.add_metric([outcome], num_windows)
    yield windows
    yield SummaryMetricFamily(
        "tapeline_shadow_call_seconds", "What a shadow's calls took.",
        shadow.num_calls, shadow.seconds,
    )  # fmt: skip
    yield SummaryMetricFamily(
        "tapeline_shadow_difference",
        "Mean absolute difference of a window's outputs from what was served.",
        shadow.num_windows,
        shadow.sum_difference,
    )
    yield GaugeMetricFamily(
        "tapeline_shadow_difference_max",
        "Largest absolute difference of an output from what was served.",
        shadow.max_difference,
    )
