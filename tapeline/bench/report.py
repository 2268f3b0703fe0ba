"""What a bench found, as data."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from schemas.errors import ConfigError
from tapeline.bench.loops import Outcome

_FORMAT = 1
_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 0.9999, 1.0)


@dataclass(frozen=True, slots=True)
class Second:
    """A second of the run, by when its requests were due; latencies in milliseconds."""

    second: int
    asked: int
    answered: int
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True, slots=True)
class Step:
    """A rate of ``stress``, and why it was too much, if it was."""

    rate_hz: float
    answered_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    errors: float
    too_much: str | None


@dataclass(frozen=True, slots=True)
class BenchReport:
    """A run of ``tapeline bench``. Latencies are from when a request was due to its answer.

    Attributes:
        kind: latency, load or stress.
        target: pipeline or deployment.
        machine, at: where and when (ISO 8601).
        options: what the command was told: rate_hz, seconds, seed, ...
        asked, answered: windows or events; a stress's are of its best rate.
        per_s: answered a second.
        latency_ms: by name: p50, p90, p95, p99, p99.9, max.
        quantiles: (share, milliseconds), for a plot.
        late_ms: the 99th percentile of how late requests were sent: large means that the generator
            was the limit.
        availability: of the seconds in which something was asked, those in which more than half of
            it was answered.
        errors: why requests failed, and how many for that reason.
        stages_ms: mean of a feature in each stage, as the workers' metrics say; empty without.
        windows_a_call: mean micro-batch, likewise.
        use_percent: highest of cpu, memory, gpu, likewise.
    """

    kind: str
    target: str
    machine: str
    at: str
    options: Mapping[str, Any]
    asked: int
    answered: int
    per_s: float
    latency_ms: Mapping[str, float]
    quantiles: Sequence[tuple[float, float]]
    late_ms: float
    availability: float
    errors: Mapping[str, int]
    seconds: Sequence[Second]
    steps: Sequence[Step] = ()
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    windows_a_call: float | None = None
    use_percent: Mapping[str, float] = field(default_factory=dict)
    format: int = _FORMAT

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ConfigError: it cannot be read, or is no report."""
        try:
            fields = json.loads(path.read_text())
            if fields.pop("format", None) != _FORMAT:
                raise ValueError(f"its format is not {_FORMAT}")
            fields["seconds"] = [Second(**one) for one in fields["seconds"]]
            fields["steps"] = [Step(**one) for one in fields["steps"]]
            return cls(**fields)
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no report of `tapeline bench ... --out`: {error}"
            ) from error

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=2) + "\n")


def summary(outcomes: Sequence[Outcome], weight: int = 1) -> dict[str, Any]:
    """The fields of a report that requests alone tell.

    Args:
        weight: windows or events in a request.
    """
    answered = [one for one in outcomes if one.error is None]
    ms = 1000 * np.array([one.latency_s for one in answered] or [np.nan])
    duration_s = max((one.ended_s for one in outcomes), default=0.0)
    seconds = by_second(outcomes)
    available = [one for one in seconds if 2 * one.answered > one.asked]
    names = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    late_ms = [1000 * (one.sent_s - one.due_s) for one in outcomes] or [0.0]
    return {
        "asked": weight * len(outcomes),
        "answered": weight * len(answered),
        "per_s": weight * len(answered) / duration_s if duration_s else 0.0,
        "latency_ms": {
            name: float(np.quantile(ms, share)) for name, share in names.items() if answered
        },
        "quantiles": [(share, float(np.quantile(ms, share))) for share in _SHARES if answered],
        "late_ms": float(np.quantile(late_ms, 0.99)),
        "availability": len(available) / len(seconds) if seconds else 0.0,
        "errors": dict(Counter(one.error for one in outcomes if one.error)),
        "seconds": seconds,
    }


def by_second(outcomes: Sequence[Outcome]) -> list[Second]:
    """Each second in which something was due."""
    groups: dict[int, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(int(one.due_s), []).append(one)
    found = []
    for second, group in sorted(groups.items()):
        ms = [1000 * one.latency_s for one in group if one.error is None]
        p50, p99 = np.quantile(ms, [0.5, 0.99]).tolist() if ms else (None, None)
        found.append(Second(second, len(group), len(ms), p50, p99))
    return found


def step(rate_hz: float, outcomes: Sequence[Outcome], weight: int, too_much: str | None) -> Step:
    """A rate of ``stress``."""
    told = summary(outcomes, weight)
    latency_ms = told["latency_ms"]
    failed = 1 - told["answered"] / max(1, told["asked"])
    return Step(
        rate_hz, told["per_s"], latency_ms.get("p50"), latency_ms.get("p99"), failed, too_much
    )
