"""A look at all metrics of a processor, without Prometheus, and what happened between two looks."""

import json
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from schemas.errors import ConfigError, TransientError
from schemas.exposition import Target

_TIMEOUT_S = 3.0


class Sample(NamedTuple):
    """One series of one process; its labels also name ``part`` and ``instance``."""

    name: str
    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class Scrape:
    """What every process said.

    Attributes:
        at_s: Unix time.
        down: those that did not answer.
    """

    at_s: float
    samples: Sequence[Sample]
    targets: Sequence[Target]
    down: Sequence[Target]


def scrape(url: str) -> Scrape:
    """Asks the process at ``url`` (its ``metrics.port``) who else there is, and all of them.

    Raises:
        ConfigError: nobody answers there.
        TransientError: who answers does not know the others at present.
    """
    try:
        found = json.loads(_get(f"{url}/targets"))
    except urllib.request.HTTPError as error:
        raise TransientError(f"{url}: {error.read().decode().strip()}") from error
    except OSError as error:
        raise ConfigError(
            f"no metrics at {url}: {error}; start `tapeline run` (or `worker`) with "
            "TAPELINE_METRICS__PORT set, and name the same port here"
        ) from error
    targets = [Target(group["targets"][0], group["labels"]["part"]) for group in found]
    with ThreadPoolExecutor(min(16, len(targets))) as pool:
        texts = list(pool.map(_text_of, targets))
    samples = [
        sample
        for target, text in zip(targets, texts, strict=True)
        if text is not None
        for sample in _samples(target, text)
    ]
    down = [target for target, text in zip(targets, texts, strict=True) if text is None]
    return Scrape(time.time(), samples, targets, down)


def firing(prometheus: str) -> list[str] | None:
    """What the alerts say that fire now; None: it does not answer."""
    try:
        alerts = json.loads(_get(f"{prometheus.rstrip('/')}/api/v1/alerts"))["data"]["alerts"]
    except (OSError, ValueError, KeyError):
        return None
    return sorted(
        f"{one['labels']['alertname']}: {one['annotations'].get('summary', '')}"
        for one in alerts
        if one["state"] == "firing"
    )


class Between:
    """What happened from one look to the next.

    A counter that is smaller than before was started anew, and counts from 0; a series that was not
    there before, too.
    """

    def __init__(self, earlier: Scrape, later: Scrape) -> None:
        self._before = {_key(one): one.value for one in earlier.samples}
        self._samples: dict[str, list[Sample]] = {}
        for sample in later.samples:
            self._samples.setdefault(sample.name, []).append(sample)
        self.seconds = later.at_s - earlier.at_s

    def now(self, name: str, **labels: str) -> list[Sample]:
        """The series of that name that have these labels."""
        return [
            one
            for one in self._samples.get(name, ())
            if all(one.labels.get(label) == value for label, value in labels.items())
        ]

    def grown(self, name: str, **labels: str) -> float:
        """By how much counters grew, in all."""
        return sum(self._grown(one) for one in self.now(name, **labels))

    def rate(self, name: str, **labels: str) -> float:
        """The same, per second."""
        return self.grown(name, **labels) / self.seconds

    def mean(self, name: str, **labels: str) -> float | None:
        """Of what a histogram or summary took in; None: nothing."""
        count = self.grown(f"{name}_count", **labels)
        return self.grown(f"{name}_sum", **labels) / count if count else None

    def quantile(self, share: float, name: str, **labels: str) -> float | None:
        """Of what a histogram took in, evenly spread within a bucket as Prometheus takes it; the
        last edge for what is above it. None: it took in nothing.
        """
        counts: dict[float, float] = {}
        for one in self.now(f"{name}_bucket", **labels):
            edge = float(one.labels["le"])
            counts[edge] = counts.get(edge, 0.0) + self._grown(one)
        edges = sorted(counts)
        if not edges or not counts[edges[-1]]:
            return None
        wanted = share * counts[edges[-1]]
        below_edge = below = 0.0
        for edge in edges:
            if counts[edge] >= wanted and counts[edge] > below:
                if edge == float("inf"):
                    break
                return below_edge + (edge - below_edge) * (wanted - below) / (counts[edge] - below)
            below_edge, below = edge, counts[edge]
        return below_edge

    def _grown(self, sample: Sample) -> float:
        before = self._before.get(_key(sample), 0.0)
        return sample.value - before if sample.value >= before else sample.value


def _key(sample: Sample) -> tuple[str, frozenset[tuple[str, str]]]:
    return sample.name, frozenset(sample.labels.items())


def _text_of(target: Target) -> str | None:
    try:
        return _get(f"http://{target.address}/metrics")
    except OSError:
        return None


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:
        text: str = answer.read().decode()
    return text


def _samples(target: Target, text: str) -> Iterator[Sample]:
    where = {"part": target.part, "instance": target.address}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield Sample(sample.name, {**where, **sample.labels}, sample.value)
