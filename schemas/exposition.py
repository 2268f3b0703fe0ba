"""A process's metrics over HTTP, and those that every process has."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client import start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import REGISTRY, Collector, CollectorRegistry

from schemas.resources import ResourceMeter, ResourceUsage


class Target(NamedTuple):
    """Where a process's metrics are read: ``http://address/metrics``.

    Attributes:
        address: host:port.
        part: worker, model or run.
    """

    address: str
    part: str


class UtilizationCollector(Collector):
    """What is in use of the machine, as this process sees it, read when Prometheus asks.

    Args:
        read: takes about a millisecond.
    """

    def __init__(self, read: Callable[[], ResourceUsage]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        now = self._read()
        for what, where, fraction in (
            ("cpu", "the cores that this process may run on, since the last scrape", now.cpu),
            ("memory", "the memory that this process may have", now.memory),
            ("gpu", "the time in which a GPU computed", now.gpu),
            ("gpu_memory", "the memory of a GPU", now.gpu_memory),
        ):
            if fraction is not None:
                name = f"cnn_lstm_{what}_utilization_percent"
                yield GaugeMetricFamily(name, f"In use of {where}.", 100 * fraction)


def expose(part: str, *, gpu: bool, registry: CollectorRegistry = REGISTRY) -> Target:
    """Serves the metrics of this process of a Ray cluster, on a free port; says where.

    Args:
        gpu: whether to look for one.
    """
    import ray

    registry.register(UtilizationCollector(ResourceMeter(gpu=gpu).read))
    server, _ = start_http_server(0, registry=registry)
    node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return Target(f"{node}:{server.server_port}", part)
