"""The native stack: a real Kafka broker and Redis on this machine, without Docker.

``up`` starts what the settings do not already name, ``status`` looks, ``down`` ends exactly what
``up`` started. Everything lies under ``settings.state_dir``::

    .tapeline/
      lock                      held while up or down work
      kafka/  process.json  server.properties  storage/  logs/broker.log  console.log
      redis/  process.json  appendonly/  console.log

An endpoint that differs from its default is somebody else's: it is used, never started or ended.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from schemas.errors import ConfigError
from schemas.redis import RedisSettings
from schemas.settings import KafkaSettings, Settings
from tapeline.processes import (
    ProcessRecord,
    free_ports,
    is_port_free,
    port_holder,
    spawn,
)
from tapeline.services import (
    KafkaService,
    Progress,
    RedisService,
    Service,
    ServiceName,
    redis_version,
    remove_folder,
)
from tapeline.topics import cluster_metadata, ensure_topics

KAFKA_PORT = 9092
REDIS_PORT = 6379
_POLL_PAUSE_S = 0.1

ServiceState = Literal["running", "external", "stopped", "unhealthy", "off"]


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One service as it is now.

    Attributes:
        state: running (ours, answers), external (the settings name it, answers), stopped,
            unhealthy (runs or is named, but does not answer), off (the settings do without it).
        pid: of our process; None for an external one.
        version: None where only the broker itself could tell.
    """

    name: ServiceName
    state: ServiceState
    endpoint: str
    pid: int | None
    version: str | None
    detail: str


class Stack:
    """Kafka and Redis of one ``state_dir``.

    A service that already runs keeps its port, whatever port is asked for here.

    Attributes:
        settings: the given ones, with the endpoints of this stack in them: give these to clients.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        kafka_port: int = KAFKA_PORT,
        redis_port: int = REDIS_PORT,
        controller_port: int | None = None,
        progress: Progress = lambda text: None,
    ) -> None:
        """Looks for what runs already; starts nothing.

        Args:
            controller_port: of Kafka's own quorum; the broker's port plus one.
            progress: is told, in a few words, what takes long.
        """
        self._progress = progress
        self._owns_kafka = names_default(settings.kafka, "bootstrap_servers")
        self._owns_redis = names_default(settings.redis, "url")
        kafka = KafkaService(settings, port=kafka_port, controller_port=0)
        redis = RedisService(settings, port=redis_port)
        kafka_port = _live_port(kafka) or kafka_port
        redis_port = _live_port(redis) or redis_port
        self.settings = _pointed_at(
            settings,
            bootstrap_servers=f"127.0.0.1:{kafka_port}" if self._owns_kafka else None,
            redis_url=f"redis://127.0.0.1:{redis_port}/0" if self._owns_redis else None,
        )
        self._services: dict[ServiceName, Service] = {
            "kafka": KafkaService(
                self.settings, port=kafka_port, controller_port=controller_port or kafka_port + 1
            ),
            "redis": RedisService(self.settings, port=redis_port),
        }

    @classmethod
    def on_free_ports(cls, settings: Settings, *, progress: Progress = lambda text: None) -> Self:
        """A stack beside any other on this machine; two of one ``state_dir`` are one, though."""
        kafka_port, controller_port, redis_port = free_ports(3)
        return cls(
            settings,
            kafka_port=kafka_port,
            controller_port=controller_port,
            redis_port=redis_port,
            progress=progress,
        )

    def up(self) -> list[ServiceStatus]:
        """Starts what is not there, waits until it serves, and creates the lanes' topics.

        What runs already stays. What this call started it ends again if it cannot finish. Blocks
        for at most about two minutes, ten more when Maven has to fetch the broker.

        Raises:
            ConfigError: a program is missing, a port is taken, a given endpoint does not answer.
        """
        with self._locked():
            self._check_given_endpoints()
            with self._started(self._owned()) as started:
                self._progress("creating topics")
                mismatches = [
                    f"topic {topic.name} {topic.detail}"
                    for topic in ensure_topics(self.settings)
                    if topic.state == "mismatch"
                ]
        fates = {service.name: "was already up" for service in self._owned()}
        fates |= dict.fromkeys(started, "started")
        statuses = [self._status(name, detail=fates.get(name, "")) for name in self._services]
        return [_with_detail(statuses[0], mismatches), *statuses[1:]]

    def down(self, *, purge: bool = False) -> list[ServiceStatus]:
        """Ends exactly the processes that ``up`` recorded; with ``purge``, deletes their files too.

        Blocks for at most a minute.
        """
        details = {}
        with self._locked():
            for service in reversed(self._services.values()):
                self._progress(f"ending {service.name}")
                details[service.name] = "ended" if self._stop(service) else "was not running"
                if purge:
                    remove_folder(service)
        if purge:
            self._remove_state_dir()
        return [
            ServiceStatus(name, "stopped", service.endpoint(), None, None, details[name])
            if self._owns(name)
            else self._status(name, detail="not ours, left alone")
            for name, service in self._services.items()
        ]

    def status(self) -> list[ServiceStatus]:
        """Looks at each service once; blocks for a few seconds at most, and raises nothing."""
        return [self._status(name) for name in self._services]

    def start(self, name: ServiceName) -> ServiceStatus:
        """Starts one service of ours on what it kept, and waits until it serves."""
        with self._locked(), self._started([self._services[name]]):
            return self._status(name)

    def stop(self, name: ServiceName) -> None:
        """Ends one service of ours; what it keeps on disk stays."""
        with self._locked():
            self._stop(self._services[name])

    def restart(self, name: ServiceName) -> ServiceStatus:
        """Ends one service and starts it on the same port and files."""
        self.stop(name)
        return self.start(name)

    def ports(self, name: ServiceName) -> tuple[int, ...]:
        """Every port that the service listens on, or would."""
        return self._services[name].ports

    def _owns(self, name: ServiceName) -> bool:
        return self._owns_kafka if name == "kafka" else self._owns_redis

    def _owned(self) -> list[Service]:
        return [service for name, service in self._services.items() if self._owns(name)]

    def _check_given_endpoints(self) -> None:
        if not self._owns_kafka:
            cluster_metadata(self.settings)
        redis = self.settings.redis
        for url in redis.more_urls if self._owns_redis else redis.urls:
            redis_version(url)

    @contextlib.contextmanager
    def _started(self, services: Sequence[Service]) -> Iterator[list[ServiceName]]:
        """All of them serve; yields those that had to be started, and ends these if it fails."""
        absent = [service for service in services if service.record.live() is None]
        for service in absent:
            _check_ports(service)
        try:
            for service in absent:
                self._start(service)
            for service in services:
                self._wait_until_ready(service)
            yield [service.name for service in absent]
        except BaseException:
            for service in absent:
                self._stop(service)
            raise

    def _start(self, service: Service) -> None:
        service.folder.mkdir(parents=True, exist_ok=True)
        service.prepare(self._progress)
        self._progress(f"starting {service.name} on port {service.port}")
        command, version = service.command(), service.version()
        with service.console.open("wb") as console:
            process = spawn(command, environment=os.environ, output=console)
        # At once: from here on the record is all that `down` knows it by.
        service.record.write(
            ProcessRecord(process.pid, process.create_time(), service.port, version)
        )

    def _wait_until_ready(self, service: Service) -> None:
        deadline_s = time.monotonic() + service.start_timeout_s
        while not service.is_ready():
            if service.record.live() is None:
                words = " / ".join(service.last_words()) or "it says nothing"
                raise ConfigError(f"{service.name} ended at once: {words}; see {service.logs[0]}")
            if time.monotonic() > deadline_s:
                raise ConfigError(
                    f"{service.name} does not answer on port {service.port} after "
                    f"{service.start_timeout_s:g} s; see {service.logs[0]}, then `tapeline down`"
                )
            time.sleep(_POLL_PAUSE_S)

    @staticmethod
    def _stop(service: Service) -> bool:
        return service.record.stop(term_timeout_s=service.stop_timeout_s)

    def _status(self, name: ServiceName, *, detail: str = "") -> ServiceStatus:
        service = self._services[name]
        found = service.record.live() if self._owns(name) else None
        pid, version = (found[0].pid, found[0].version) if found else (None, None)
        endpoint = service.endpoint()
        if not self._owns(name) and not endpoint:
            return ServiceStatus(name, "off", "", None, None, "the settings name none")
        if self._owns(name) and not found:
            return ServiceStatus(name, "stopped", endpoint, None, None, detail or "`tapeline up`")
        try:
            answer = service.ping()
        except ConfigError as error:
            return ServiceStatus(name, "unhealthy", endpoint, pid, version, str(error))
        if name == "redis":
            version = answer
        state: ServiceState = "running" if self._owns(name) else "external"
        return ServiceStatus(name, state, endpoint, pid, version, detail or answer)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One ``up`` or ``down`` at a time in a ``state_dir``; a second is refused, not queued."""
        path = self._state_dir() / "lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        except OSError as error:
            raise ConfigError(
                f"cannot write to {path.parent}: {error.strerror}; "
                "point TAPELINE_STATE_DIR at a folder of yours"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"another `tapeline up` or `down` works on {path.parent}; wait for it to end"
                ) from error
            yield

    def _state_dir(self) -> Path:
        return self.settings.state_dir.resolve()

    def _remove_state_dir(self) -> None:
        (self._state_dir() / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # the user keeps more in it
            self._state_dir().rmdir()


def with_stack_endpoints(settings: Settings) -> Settings:
    """The settings, pointed at the stack of their ``state_dir`` if one runs on other ports."""
    return Stack(settings).settings


def _live_port(service: Service) -> int | None:
    found = service.record.live()
    return found[0].port if found else None


def names_default(section: KafkaSettings | RedisSettings, key: str) -> bool:
    """``model_fields_set`` cannot tell: one key given marks its whole section as given."""
    return bool(getattr(section, key) == type(section).model_fields[key].default)


def _pointed_at(
    settings: Settings, *, bootstrap_servers: str | None, redis_url: str | None
) -> Settings:
    update: dict[str, object] = {}
    if bootstrap_servers is not None:
        update["kafka"] = settings.kafka.model_copy(update={"bootstrap_servers": bootstrap_servers})
    if redis_url is not None:
        update["redis"] = settings.redis.model_copy(update={"url": redis_url})
    return settings.model_copy(update=update)


def _check_ports(service: Service) -> None:
    for port in service.ports:
        if not is_port_free(port):
            raise ConfigError(_port_taken(service, port))


def _port_taken(service: Service, port: int) -> str:
    holder = port_holder(port)
    who = f"{holder.name()} (pid {holder.pid})" if holder else "another program"
    free = (
        f"end it with `kill {holder.pid}`" if holder else f"find it with `ss -ltnp | grep {port}`"
    )
    given = {
        "kafka": f"TAPELINE_KAFKA__BOOTSTRAP_SERVERS=localhost:{port}",
        "redis": f"TAPELINE_REDIS__URL=redis://localhost:{port}/0",
    }[service.name]
    text = f"port {port}, which {service.name} needs, is taken by {who}: {free}, or start ours on "
    text += f"another with `tapeline up --{service.name}-port {service.port + 10_000}`"
    return f"{text}, or use what is there with {given}" if port == service.port else text


def _with_detail(status: ServiceStatus, more: list[str]) -> ServiceStatus:
    if not more:
        return status
    detail = "; ".join([status.detail, *more])
    return ServiceStatus(
        status.name, status.state, status.endpoint, status.pid, status.version, detail
    )
