"""Promises against figures, pure: what is not known is unknown, never a pass."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from schemas.sla import SlaSettings


class Verdict(StrEnum):
    KEPT = "kept"
    BROKEN = "broken"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured; None: it was not.

    Attributes:
        latency_ms: by ``p50``, ``p95``, ``p99``, ``max``.
        asked_per_s, per_s: asked for and answered a second.
        availability, errors: shares, 0 to 1.
        use_percent: by ``cpu``, ``memory``, ``gpu``: the fullest.
        has_gpu: False: its promise is left out.
        stages_ms: mean of a feature by stage.
        windows_a_call: mean micro-batch.
        late_ms: how late a bench sent, 99th percentile.
    """

    latency_ms: Mapping[str, float] = field(default_factory=dict)
    asked_per_s: float | None = None
    per_s: float | None = None
    availability: float | None = None
    errors: float | None = None
    use_percent: Mapping[str, float] = field(default_factory=dict)
    has_gpu: bool = False
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    windows_a_call: float | None = None
    late_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One promise."""

    name: str
    value: float | None
    limit: float
    verdict: Verdict
    note: str = ""


@dataclass(frozen=True, slots=True)
class Advice:
    """What to change, and the figures that say so."""

    what: str
    evidence: str


def check(figures: Figures, sla: SlaSettings) -> list[Check]:
    """Every promise, in the order of the settings."""
    checks = [
        _at_most(f"latency {name}, ms", figures.latency_ms.get(name), limit)
        for name, limit in (
            ("p50", sla.p50_ms),
            ("p95", sla.p95_ms),
            ("p99", sla.p99_ms),
            ("max", sla.max_ms),
        )
    ]
    for name, limit in (
        ("least", sla.min_per_s),
        ("promised", sla.target_per_s),
        ("peak", sla.max_per_s),
    ):
        checks.append(_throughput(figures, f"features/s, {name}", limit))
    checks.append(_at_least("availability", figures.availability, sla.availability))
    checks.append(_at_most("errors", figures.errors, sla.errors))
    for name in ("cpu", "memory", "gpu"):
        if name != "gpu" or figures.has_gpu:
            limit = getattr(sla, f"{name}_percent")
            checks.append(_at_most(f"{name}, %", figures.use_percent.get(name), limit))
    return checks


def verdict(checks: list[Check]) -> Verdict:
    """Of all of them: broken if one is, kept only if all are."""
    found = {one.verdict for one in checks}
    worst_first = (Verdict.BROKEN, Verdict.UNKNOWN)
    return next((one for one in worst_first if one in found), Verdict.KEPT)


def _at_most(name: str, value: float | None, limit: float) -> Check:
    if value is None:
        return Check(name, None, limit, Verdict.UNKNOWN, "not measured")
    return Check(name, value, limit, Verdict.KEPT if value <= limit else Verdict.BROKEN)


def _at_least(name: str, value: float | None, limit: float) -> Check:
    if value is None:
        return Check(name, None, limit, Verdict.UNKNOWN, "not measured")
    return Check(name, value, limit, Verdict.KEPT if value >= limit else Verdict.BROKEN)


def _throughput(figures: Figures, name: str, limit: float) -> Check:
    """What was never asked for says nothing about what could have been."""
    found = _at_least(name, figures.per_s, limit)
    if found.verdict is Verdict.BROKEN and (figures.asked_per_s or 0) < limit:
        return Check(name, figures.per_s, limit, Verdict.UNKNOWN, "so many were not asked for")
    return found


_STAGE_ADVICE = {
    "broker": "more workers take from the topics sooner: raise serve.num_workers, up to the "
    "partitions, or autoscale.max_workers",
    "queue": "records wait for their turn: raise the lane's reserved_share, or model.num_replicas "
    "if the model is busy; lower worker.max_service_share for smaller micro-batches",
    "batch": "decoding, Redis and windows take long: raise serve.num_workers, and look whether "
    "Redis is far away (redis.url)",
    "model": "make the model faster (`tapeline model optimize`, a GPU), or raise "
    "model.num_replicas; worker.max_in_flight = 1 ends the wait for each other",
    "publish": "the broker acknowledges late: look at its disks; with exactly_once lower "
    "worker.transaction_interval_ms",
}


def advise(figures: Figures, checks: list[Check]) -> list[Advice]:
    """The guilty stage and the setting to change, for each promise that is not kept."""
    broken = {one.name for one in checks if one.verdict is Verdict.BROKEN}
    return list(_advice(figures, broken))


def _advice(figures: Figures, broken: set[str]) -> Iterator[Advice]:
    use = figures.use_percent
    if figures.late_ms is not None and figures.late_ms > 20:
        yield Advice(
            "the load came late: run `tapeline bench` on another machine, or at a lower rate",
            f"requests were sent {figures.late_ms:.0f} ms late at p99",
        )
    if any(name.startswith("latency") for name in broken):
        if figures.stages_ms:
            stage = max(figures.stages_ms, key=lambda one: figures.stages_ms[one])
            mean_ms, whole_ms = figures.stages_ms[stage], sum(figures.stages_ms.values())
            yield Advice(
                _STAGE_ADVICE[stage],
                f"stage {stage} takes {mean_ms:.1f} of {whole_ms:.1f} ms on average",
            )
        else:
            yield Advice(
                "set metrics.port, so that the guilty stage is known",
                "no figures by stage",
            )
    if any(name.startswith("features/s") for name in broken):
        if use.get("cpu", 0) > 80:
            yield Advice(
                "the processors are busy: more machines, or serve.num_workers on free cores",
                f"cpu {use['cpu']:.0f} %, {figures.per_s or 0:.0f} features/s",
            )
        else:
            yield Advice(
                "something waits: raise worker.max_in_flight or model.num_replicas",
                f"cpu {use.get('cpu', float('nan')):.0f} %, {figures.per_s or 0:.0f} features/s",
            )
    if "errors" in broken:
        yield Advice(
            "`tapeline dlq ls` says which records were set aside, the workers' log what the model "
            "answered; after a promotion `tapeline model rollback`",
            f"{figures.errors or 0:.2%} got no features",
        )
    if "availability" in broken:
        yield Advice(
            "more than one of each: serve.num_workers and model.num_replicas at least 2, on two "
            "machines",
            f"available for {figures.availability or 0:.2%} of the time",
        )
    for name, setting in (
        ("cpu", "serve.num_workers on more machines, or worker.max_in_flight lower"),
        ("memory", "window.max_symbols or cache.memory_mb lower"),
        ("gpu", "model.num_replicas on more GPUs"),
    ):
        if f"{name}, %" in broken:
            yield Advice(setting, f"{name} {use[name]:.0f} % at the fullest")
