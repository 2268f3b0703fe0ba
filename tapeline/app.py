"""The whole processor, started here: as one Ray Serve application, or in a plain process."""

import asyncio
import faulthandler
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import structlog
from prometheus_client.registry import REGISTRY, Collector

from consumers.dedup import open_first_seen
from consumers.identity import claimed_name
from consumers.metrics import LaneCounts, WorkerStatistics
from consumers.tracing import open_tracing
from consumers.worker import Worker
from inference.client import LocalInferencer, engine_thread
from inference.redeploy import MODEL_NAME, WORKER_NAME
from schemas.errors import ConfigError, TransientError
from schemas.exposition import Target, UtilizationCollector
from schemas.live import demand_only_live
from schemas.pauses import spare_what_is_loaded
from schemas.placement import pin_process
from schemas.resources import ResourceMeter
from schemas.settings import Settings
from tapeline.clients import check_kafka
from tapeline.metrics.cluster import ApplicationCollector
from tapeline.metrics.lag import LagCollector
from tapeline.metrics.server import metrics_server

if TYPE_CHECKING:
    from ray.serve import Application

    from inference.hosted import HostedModels

_EXIT_GRACE_S = 5.0
_TARGETS_TIMEOUT_S = 3.0

_log = structlog.get_logger(__name__)


def check_surroundings(settings: Settings) -> None:
    """Raises ConfigError unless broker, topics and Redis answer."""
    lanes = settings.active_lanes
    topics = [topic for lane in lanes for topic in (lane.topic, lane.output_topic, lane.dlq_topic)]
    check_kafka(settings, topics)

    async def check_redis() -> None:
        await (await open_first_seen(settings.redis)).close()

    asyncio.run(check_redis())


async def run_worker(
    settings: Settings,
    *,
    on_started: Callable[[], None],
    reload: Callable[[], Settings] | None = None,
) -> WorkerStatistics:
    """Runs one worker with the model in this process until SIGTERM or SIGINT.

    SIGHUP has it take the shares, deadlines and limits of ``reload()``; where that raises
    ConfigError, or gives anything else that is new, the log says so and all stays as it is.

    From then on it takes at most ``stop_limit_s``: a process that hangs for longer, in a model say,
    ends itself with exit code 1.

    Raises ConfigError, or what ended the loop.
    """
    from inference.hosted import host_models  # torch, only here

    pin_process("worker.cpu_affinity", settings.worker.cpu_affinity)
    loop, thread = asyncio.get_running_loop(), engine_thread()
    models = await loop.run_in_executor(thread, host_models, settings.model, settings.window)
    inferencer = LocalInferencer(models, thread)
    first_seen = await open_first_seen(settings.redis)
    with claimed_name(settings) as name:
        tracing = open_tracing(settings.tracing)
        worker = Worker(settings, inferencer, first_seen, instance_id=name, tracing=tracing)

        def stop() -> None:
            _end_process_after(stop_limit_s(settings))
            worker.stop()

        for signal_number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signal_number, stop)
        if reload:
            loop.add_signal_handler(signal.SIGHUP, _reconfigure, worker.configure, reload)
        spare_what_is_loaded()
        try:
            with _worker_metrics(settings, models):
                on_started()
                await worker.run()
        except BaseException:
            _end_process_after(_EXIT_GRACE_S)  # a call into librdkafka or the model may hang
            raise
        finally:
            await inferencer.close()
            await first_seen.close()
    return worker.statistics()


@contextmanager
def _worker_metrics(settings: Settings, models: "HostedModels") -> Iterator[None]:
    """``metrics.port`` of one worker: its own, its model's, and the lanes' lag."""
    if not settings.metrics.port:
        yield
        return
    from inference.metrics import ModelCollector

    has_gpu = models.describe().device != "cpu"
    with (
        closing(LagCollector(settings)) as lag,
        _collecting(
            lag,
            ModelCollector(models.statistics, models.calls),
            UtilizationCollector(ResourceMeter(gpu=has_gpu).read),
        ),
        metrics_server(
            settings.metrics.port, REGISTRY, list, "worker", settings.metrics.prometheus
        ),
    ):
        yield


@contextmanager
def _collecting(*collectors: Collector) -> Iterator[None]:
    """Has this process's registry hold them."""
    for collector in collectors:
        REGISTRY.register(collector)
    try:
        yield
    finally:
        for collector in collectors:
            REGISTRY.unregister(collector)


def _reconfigure(configure: Callable[[Settings], None], reload: Callable[[], Settings]) -> None:
    try:
        configure(reload())
    except ConfigError as error:
        structlog.get_logger(__name__).error("settings_refused", error=str(error))


def stop_limit_s(settings: Settings) -> float:
    """How long a worker may take to end: to drain, to commit, to leave its groups."""
    return settings.worker.drain_timeout_s + 3 * settings.kafka.timeout_s


def _end_process_after(limit_s: float) -> None:
    def end() -> None:
        structlog.get_logger(__name__).error("worker_hangs", limit_s=limit_s)
        faulthandler.dump_traceback()  # where each thread stands, to stderr
        os._exit(1)

    timer = threading.Timer(limit_s, end)
    timer.daemon = True
    timer.start()


class ServeApplication:
    """The processor on Ray Serve: an application of workers and model, and perhaps one for HTTP."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name = settings.serve.app_name
        self._http_name = f"{self._name}-http"

    def deploy(self) -> None:
        """Starts all deployments and waits until every replica works.

        Raises ConfigError with the replica's own sentence if one cannot start.
        """
        self._deploy_stream()
        if self._settings.http.enabled:
            from tapeline.http.deployment import build_http_deployment

            self._run(build_http_deployment(self._settings), self._http_name, "/")

    def _deploy_stream(self) -> None:
        import ray

        from tapeline.serving import build_application

        num_gpus = self._settings.serve.model_num_gpus
        if num_gpus and not ray.cluster_resources().get("GPU"):  # type: ignore[no-untyped-call]
            _log.warning(
                "no_gpu_in_the_cluster",
                model_num_gpus=num_gpus,
                hint="the model waits for one; serve.model_num_gpus = 0 runs it on CPUs",
            )
        self._run(build_application(self._settings), self._name, None)

    def _run(self, application: "Application", name: str, route_prefix: str | None) -> None:
        from ray import serve

        try:
            serve.run(application, name=name, route_prefix=route_prefix)
        except RuntimeError as error:
            status = serve.status().applications.get(name)
            reports = [one.message for one in status.deployments.values()] if status else []
            raise ConfigError(_cause([*reports, str(error)])) from error

    def reconfigure(self, settings: Settings) -> None:
        """Has every worker take other shares, deadlines and limits, without a restart.

        Raises ConfigError, and changes nothing, if anything else differs.
        """
        demand_only_live(self._settings, settings)
        self._settings = settings
        self._deploy_stream()

    def statistics(self) -> list[WorkerStatistics]:
        """Of every worker replica; blocks for some milliseconds."""
        return self._of_every_worker("statistics")

    def drain(self) -> list[WorkerStatistics]:
        """Has every worker finish what is in flight, commit and leave; their last statistics.

        Blocks for at most the timeouts of the settings.
        """
        return self._of_every_worker("drain")

    @contextmanager
    def metrics(self) -> Iterator[int | None]:
        """``metrics.port``: the lanes' lag, how many replicas there are, and where the metrics of
        each of them are. Yields the port.
        """
        settings = self._settings
        if not settings.metrics.port:
            yield None
            return
        with (
            closing(LagCollector(settings)) as lag,
            _collecting(lag, ApplicationCollector(settings)),
            metrics_server(
                settings.metrics.port,
                REGISTRY,
                self._metrics_targets,
                "run",
                settings.metrics.prometheus,
            ) as port,
        ):
            yield port

    def _metrics_targets(self) -> list[Target]:
        """Raises TransientError while a deployment does not answer."""
        from ray import serve

        found: list[Target | None] = []
        for name in (WORKER_NAME, MODEL_NAME):
            handle = serve.get_deployment_handle(name, self._name)
            try:
                found += handle.broadcast("metrics_target").results(timeout_s=_TARGETS_TIMEOUT_S)
            except Exception as error:  # Ray's errors have no common base
                raise TransientError(f"deployment {name} does not answer: {error}") from error
        return [one for one in found if one]

    def delete(self) -> None:
        """Takes all deployments away; blocks until their replicas are gone."""
        from ray import serve

        if self._settings.http.enabled:
            serve.delete(self._http_name)
        serve.delete(self._name)

    def _of_every_worker(self, method: str) -> list[WorkerStatistics]:
        from ray import serve

        timeout_s = self._settings.worker.drain_timeout_s + 2 * self._settings.kafka.timeout_s
        handle = serve.get_deployment_handle(WORKER_NAME, self._name)
        results: list[WorkerStatistics] = handle.broadcast(method).results(timeout_s=timeout_s)
        return results


@contextmanager
def ray_session(settings: Settings, *, log_to_driver: bool = True) -> Iterator[str]:
    """Ray with Serve in it, yields where: the cluster that the settings or $RAY_ADDRESS name,
    else one of our own, which ends with the context.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    address = settings.serve.address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        _probe(address)
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=log_to_driver,
            logging_level=logging.ERROR,
        )
    except OSError as error:
        raise ConfigError(
            f"no Ray cluster answers at {address}: start one with `ray start --head`, or unset "
            "TAPELINE_SERVE__ADDRESS to run one here"
        ) from error
    try:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        http = settings.http
        serve.start(
            proxy_location="EveryNode" if http.enabled else "Disabled",
            http_options={"host": http.host, "port": http.port},
            logging_config={"log_level": "WARNING"},
        )
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Raises OSError where nobody listens; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=5).close()


def total_counts(workers: list[WorkerStatistics]) -> dict[str, LaneCounts]:
    """The counts of all workers together, by lane."""
    totals: dict[str, LaneCounts] = {}
    for worker in workers:
        for lane, counts in worker.lanes.items():
            totals[lane] = totals.get(lane, LaneCounts()) + counts
    return totals


def _cause(reports: list[str]) -> str:
    """The sentence of a ConfigError inside a replica's traceback, else the last line of it."""
    for report in reports:
        for line in report.splitlines():
            name, _, sentence = line.strip().partition("ConfigError: ")
            if sentence and " " not in name:
                return sentence
    lines = [line.strip() for report in reports for line in report.splitlines() if line.strip()]
    return f"the application did not start: {lines[-1] if lines else 'Ray gives no reason'}"
