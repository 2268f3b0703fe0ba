"""What only the process that deployed the application knows: how many there are, and should be."""

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from schemas.settings import Settings
from tapeline.autoscale.trace import last, trace_path


class ApplicationCollector(Collector):
    """Replicas by state, and what autoscaling wants."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def collect(self) -> Iterator[Metric]:
        from ray import serve

        replicas = GaugeMetricFamily(
            "tapeline_replicas", "Of a deployment, by state.", labels=["deployment", "state"]
        )
        application = serve.status().applications.get(self._settings.serve.app_name)
        for name, deployment in application.deployments.items() if application else ():
            for state, number in deployment.replica_states.items():
                replicas.add_metric([name, str(state)], number)
        yield replicas
        if self._settings.autoscale.enabled:
            yield from self._decisions()

    def _decisions(self) -> Iterator[Metric]:
        """By the last decision of each, where it is recorded on this machine."""
        target = GaugeMetricFamily(
            "tapeline_autoscale_target", "How many there are to be.", labels=["role"]
        )
        held = GaugeMetricFamily(
            "tapeline_autoscale_held",
            "1 while the number stays as it is because lag is unknown.",
            labels=["role"],
        )
        path = trace_path(self._settings)
        for role, entry in last(path).items() if path.exists() else ():
            if entry.decision:
                target.add_metric([role], entry.decision.target)
            held.add_metric([role], entry.decision is None)
        yield from (target, held)
