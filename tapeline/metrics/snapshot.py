"""What a person wants to see of a running processor, from two looks at its metrics."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from schemas.timing import STAGES
from tapeline.metrics.scrape import Between, Scrape, firing, scrape

_SHORTEST_S = 1.0


@dataclass(frozen=True, slots=True)
class LaneView:
    """A lane since the last look; latency from event to feature. None: nothing was measured."""

    lane: str
    events_per_s: float
    features_per_s: float
    lag_records: int | None
    lag_s: float | None
    queued: int
    in_flight: int
    paused: bool
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    duplicates: int
    dead_letters: int


@dataclass(frozen=True, slots=True)
class ModelView:
    """The model since the last look; milliseconds of a micro-batch at it.

    Attributes:
        asked_per_s: windows, those from the cache included.
        cache_hits: of the windows looked for there.
    """

    versions: Sequence[str]
    asked_per_s: float
    windows_per_s: float
    calls_per_s: float
    windows_a_call: float | None
    p50_ms: float | None
    p99_ms: float | None
    errors: float | None
    cache_hits: float | None


@dataclass(frozen=True, slots=True)
class ProcessView:
    """A process and its machine, percent; None: it does not say."""

    part: str
    instance: str
    cpu: float | None
    memory: float | None
    gpu: float | None
    gpu_memory: float | None
    partitions: int | None
    resident_mb: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All of it.

    Attributes:
        at_s: Unix time of the later look.
        seconds: between the two.
        stages_ms: mean of a feature in each stage.
        replicas: by deployment and state.
        targets: what autoscaling wants, by role.
        down: processes that did not answer.
        alerts: that fire now; None: no Prometheus is known, or it does not answer.
    """

    at_s: float
    seconds: float
    lanes: Sequence[LaneView]
    stages_ms: Mapping[str, float]
    model: ModelView
    processes: Sequence[ProcessView]
    replicas: Mapping[str, Mapping[str, int]]
    targets: Mapping[str, int]
    down: Sequence[str]
    alerts: Sequence[str] | None = None


def snapshot(earlier: Scrape, later: Scrape, alerts: Sequence[str] | None = None) -> Snapshot:
    """What happened from one look to the next, and how things are at the later one."""
    between = Between(earlier, later)
    lanes = list(
        dict.fromkeys(one.labels["lane"] for one in between.now("tapeline_queued_records"))
    )
    stages = {stage: between.mean("tapeline_stage_seconds", stage=stage) for stage in STAGES}
    replicas: dict[str, dict[str, int]] = {}
    for one in between.now("tapeline_replicas"):
        replicas.setdefault(one.labels["deployment"], {})[one.labels["state"]] = int(one.value)
    return Snapshot(
        at_s=later.at_s,
        seconds=between.seconds,
        lanes=[_lane(between, lane) for lane in lanes],
        stages_ms={stage: 1000 * mean for stage, mean in stages.items() if mean is not None},
        model=_model(between),
        processes=[
            _process(between, target.part, target.address)
            for target in later.targets
            if target not in later.down
        ],
        replicas=replicas,
        targets={
            one.labels["role"]: int(one.value) for one in between.now("tapeline_autoscale_target")
        },
        down=[f"{target.part} {target.address}" for target in later.down],
        alerts=alerts,
    )


class Sampler:
    """Snapshots of a processor, each since the last one.

    Args:
        url: of ``metrics.port``.
        prometheus: whose alerts are shown; None: nobody's.
    """

    def __init__(self, url: str, prometheus: str | None = None) -> None:
        self._url = url
        self._prometheus = prometheus
        self._lock = threading.Lock()
        self._last: Scrape | None = None
        self._snapshot: Snapshot | None = None

    def next(self) -> Snapshot:
        """Whoever asks sooner than a second after the last one gets that one; the very first takes
        a second. Raises ConfigError, TransientError: see ``scrape``.
        """
        with self._lock:
            if self._last is None:
                self._last = scrape(self._url)
                time.sleep(_SHORTEST_S)
            if self._snapshot is None or time.time() - self._last.at_s >= _SHORTEST_S:
                now = scrape(self._url)
                alerts = firing(self._prometheus) if self._prometheus else None
                self._snapshot, self._last = snapshot(self._last, now, alerts), now
            return self._snapshot


def _lane(between: Between, lane: str) -> LaneView:
    def total(name: str) -> int:
        return int(sum(one.value for one in between.now(name, lane=lane)))

    def ended(outcome: str) -> int:
        found = between.now("tapeline_records_total", lane=lane, outcome=outcome)
        return int(sum(one.value for one in found))

    def per_s(outcome: str) -> float:
        return between.rate("tapeline_records_total", lane=lane, outcome=outcome)

    records, seconds = (
        max((one.value for one in between.now(name, lane=lane)), default=None)
        for name in ("tapeline_lag_records", "tapeline_lag_seconds")
    )
    p50, p95, p99 = (
        _ms(between.quantile(share, "tapeline_latency_seconds", lane=lane))
        for share in (0.5, 0.95, 0.99)
    )
    return LaneView(
        lane=lane,
        events_per_s=per_s("records"),
        features_per_s=per_s("features"),
        lag_records=None if records is None else int(records),
        lag_s=seconds,
        queued=total("tapeline_queued_records"),
        in_flight=total("tapeline_in_flight_records"),
        paused=bool(total("tapeline_paused")),
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        duplicates=ended("duplicates"),
        dead_letters=ended("dead_letters"),
    )


def _model(between: Between) -> ModelView:
    asked = between.grown("cnn_lstm_prediction_requests_total")
    hits = between.grown("cnn_lstm_cache_hits_total")
    looked_for = hits + between.grown("cnn_lstm_cache_misses_total")
    time_name = "cnn_lstm_batch_processing_time_seconds"
    return ModelView(
        versions=sorted(
            {one.labels["model_version"] for one in between.now("tapeline_serving_model")}
        ),
        asked_per_s=asked / between.seconds,
        windows_per_s=between.rate("cnn_lstm_batch_size_sum"),
        calls_per_s=between.rate("cnn_lstm_batch_size_count"),
        windows_a_call=between.mean("cnn_lstm_batch_size"),
        p50_ms=_ms(between.quantile(0.5, time_name)),
        p99_ms=_ms(between.quantile(0.99, time_name)),
        errors=between.grown("cnn_lstm_prediction_errors_total") / asked if asked else None,
        cache_hits=hits / looked_for if looked_for else None,
    )


def _process(between: Between, part: str, instance: str) -> ProcessView:
    def value(name: str) -> float | None:
        found = between.now(name, instance=instance)
        return found[0].value if found else None

    partitions, resident = (
        value("tapeline_assigned_partitions"),
        value("process_resident_memory_bytes"),
    )
    return ProcessView(
        part=part,
        instance=instance,
        cpu=value("cnn_lstm_cpu_utilization_percent"),
        memory=value("cnn_lstm_memory_utilization_percent"),
        gpu=value("cnn_lstm_gpu_utilization_percent"),
        gpu_memory=value("cnn_lstm_gpu_memory_utilization_percent"),
        partitions=None if partitions is None else int(partitions),
        resident_mb=None if resident is None else resident / 1e6,
    )


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds
