"""The two servers of the native stack: what each needs, how it is started, how to tell it is ready.

``stack`` decides when; this file knows how. Both run the configuration that docker-compose.yml
mounts, with address and folders laid over it.
"""

import base64
import os
import re
import shutil
import tempfile
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Literal
from xml.etree import ElementTree

import redis

from schemas.errors import ConfigError
from schemas.resources import allowed_cores
from schemas.settings import Settings
from tapeline.processes import RecordFile, find_program, is_port_free, program_output
from tapeline.topics import cluster_metadata

MIN_JAVA_VERSION = 17
JAVA_PACKAGE = "openjdk-17-jre-headless"
ServiceName = Literal["kafka", "redis"]
Progress = Callable[[str], None]

_PING_TIMEOUT_S = 2.0
_MAVEN_TIMEOUT_S = 600.0
_TOOL_TIMEOUT_S = 60.0
_NUM_LAST_WORDS = 4
_ERROR = re.compile("error|fatal|exception", re.IGNORECASE)
_HEAP = ("-Xms256m", "-Xmx512m")
# G1 with Kafka's own pause target: a pause of the broker is latency in every lane.
_JVM = (
    *_HEAP, "-server", "-XX:+UseG1GC", "-XX:MaxGCPauseMillis=20", "-Djava.awt.headless=true",
)  # fmt: skip
# C1 alone where there are few cores: on two, C2 compiled for most of a broker's first minute, and
# took the processor's time for it. On many, what C2 compiles is worth it.
_COMPILE_LITTLE = "-XX:TieredStopAtLevel=1"
_FEW_CORES = 4


def ops_folder() -> Path:
    """The configuration files: beside the packages in a checkout, inside this one in a wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here.parent / "ops", here / "ops"):
        if (folder / "kafka" / "pom.xml").is_file():
            return folder
    raise ConfigError("this installation lacks ops/kafka; install tapeline again")


def kafka_version() -> str:
    """The version of the native broker, as ops/kafka/pom.xml names it."""
    pom = ElementTree.parse(ops_folder() / "kafka" / "pom.xml")
    version = pom.findtext(".//{*}properties/{*}kafka.version")
    assert version
    return version


def java_version(java: str) -> int:
    """The feature version (17) of a java executable. A program that fails is OSError."""
    text = program_output([java, "-version"], timeout_s=_TOOL_TIMEOUT_S)
    match = re.search(r'version "(\d+)', text)
    if match is None:
        raise OSError(f"{java} does not say its version")
    return int(match[1])


def find_java() -> str:
    """A java new enough for Kafka: $JAVA_HOME's, else the PATH's. Else ConfigError."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home, "bin", "java")) if home else None
    if java is None or not os.access(java, os.X_OK):
        java = find_program("java", package=JAVA_PACKAGE, wanted_for="the Kafka broker")
    try:
        version = java_version(java)
    except OSError as error:
        raise ConfigError(f"{error}; install `apt-get install {JAVA_PACKAGE}`") from error
    if version < MIN_JAVA_VERSION:
        raise ConfigError(
            f"{java} is Java {version}, Kafka needs {MIN_JAVA_VERSION}; install it with "
            f"`apt-get install {JAVA_PACKAGE}` and point JAVA_HOME at it"
        )
    return java


def redis_version(url: str, *, timeout_s: float = _PING_TIMEOUT_S) -> str:
    """The version of the Redis that answers at ``url``. Raises ConfigError if none does."""
    shown = re.sub(r"//[^@/]*@", "//", url)  # without user and password
    try:
        client = redis.Redis.from_url(
            url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=None
        )
        with client:
            client.ping()
            return str(client.info("server")["redis_version"])
    except ValueError as error:
        raise ConfigError(
            f"redis.url {shown!r} is not a Redis address: {error}; "
            "write it as redis://host:port/db in TAPELINE_REDIS__URL"
        ) from error
    except redis.RedisError as error:
        raise ConfigError(
            f"no Redis answers at {shown} ({error}); start one with `tapeline up` or point "
            "TAPELINE_REDIS__URL at yours"
        ) from error


class Service(ABC):
    """One server of the native stack, in a folder of its own.

    Attributes:
        settings: whose endpoint for this service is the one below.
        port: where it listens, on 127.0.0.1.
    """

    name: ClassVar[ServiceName]
    start_timeout_s: ClassVar[float]
    stop_timeout_s: ClassVar[float]

    def __init__(self, settings: Settings, *, port: int) -> None:
        self.settings = settings
        self.port = port
        self.folder = settings.state_dir.resolve() / self.name
        self.record = RecordFile(self.folder / "process.json")

    @property
    def ports(self) -> tuple[int, ...]:
        """Every port it listens on."""
        return (self.port,)

    @property
    def console(self) -> Path:
        """What it prints; the first place to look when it does not start."""
        return self.folder / "console.log"

    @property
    def logs(self) -> tuple[Path, ...]:
        return (self.console,)

    @abstractmethod
    def endpoint(self) -> str:
        """As the settings name it."""

    @abstractmethod
    def version(self) -> str:
        """Of the program that ``command`` starts. Raises ConfigError if it is missing."""

    @abstractmethod
    def prepare(self, progress: Progress) -> None:
        """Whatever the first start takes: programs, jars, formatted storage. May take minutes."""

    @abstractmethod
    def command(self) -> list[str]:
        """The program and its arguments, after ``prepare``."""

    @abstractmethod
    def ping(self) -> str:
        """The version that answers, or what it tells instead. Raises ConfigError if nobody does."""

    def is_ready(self) -> bool:
        """Whether it serves requests now; blocks for at most about two seconds."""
        if is_port_free(self.port):
            return False
        try:
            self.ping()
        except ConfigError:
            return False
        return True

    def last_words(self) -> Iterator[str]:
        """The end of its logs: from the last error on where there is one."""
        for path in self.logs:
            if path.is_file():
                text = path.read_text(errors="replace")
                lines = [line for line in text.splitlines()[-200:] if line and line[0] != "\t"]
                errors = [i for i, line in enumerate(lines) if _ERROR.search(line)]
                first = errors[-1] if errors else -2
                yield from lines[first:][:_NUM_LAST_WORDS]


class KafkaService(Service):
    """A KRaft broker and controller in one JVM, run straight from Maven's jars."""

    name = "kafka"
    start_timeout_s = 90.0
    stop_timeout_s = 30.0

    def __init__(self, settings: Settings, *, port: int, controller_port: int) -> None:
        super().__init__(settings, port=port)
        self.controller_port = controller_port
        self._properties = self.folder / "server.properties"
        self._storage = self.folder / "storage"
        self._logs = self.folder / "logs"

    @property
    def ports(self) -> tuple[int, ...]:
        return (self.port, self.controller_port)

    @property
    def logs(self) -> tuple[Path, ...]:
        return (self._logs / "broker.log", self.console)

    def endpoint(self) -> str:
        return self.settings.kafka.bootstrap_servers

    def version(self) -> str:
        return kafka_version()

    def prepare(self, progress: Progress) -> None:
        find_java()
        self._jars(progress)
        self._logs.mkdir(parents=True, exist_ok=True)
        self.write_properties()
        if not (self._storage / "meta.properties").exists():
            progress("formatting Kafka's storage")
            self._format()

    def command(self) -> list[str]:
        return self._java("kafka.Kafka", str(self._properties))

    def ping(self) -> str:
        metadata = cluster_metadata(self.settings, timeout_s=_PING_TIMEOUT_S)
        if not metadata.brokers:
            raise ConfigError(f"the broker at {self.endpoint()} has not joined its cluster")
        return f"{len(metadata.brokers)} broker(s), cluster {metadata.cluster_id}"

    def _java(self, main_class: str, *arguments: str) -> list[str]:
        return [
            os.path.abspath(find_java()),
            *_JVM,
            *([_COMPILE_LITTLE] if len(allowed_cores()) <= _FEW_CORES else []),
            f"-Dkafka.logs.dir={self._logs}",
            f"-Dlog4j2.configurationFile={ops_folder() / 'kafka' / 'log4j2.xml'}",
            "-cp",
            str(self._jars(lambda _: None) / "*"),
            main_class,
            *arguments,
        ]

    def write_properties(self) -> None:
        """The shared file, then what is ours: of two values of a key the last one wins."""
        shared = (ops_folder() / "kafka" / "server.properties").read_text()
        overrides = {
            "listeners": f"PLAINTEXT://127.0.0.1:{self.port},"
            f"CONTROLLER://127.0.0.1:{self.controller_port}",
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self.port}",
            "controller.quorum.voters": f"1@127.0.0.1:{self.controller_port}",
            "log.dirs": str(self._storage),
        }
        lines = "".join(f"{key}={value}\n" for key, value in overrides.items())
        self._properties.write_text(f"{shared}\n# laid over it by `tapeline up`\n{lines}")

    def _format(self) -> None:
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        tool = self._java(
            "kafka.tools.StorageTool", "format", f"--cluster-id={cluster_id}",
            f"--config={self._properties}",
        )  # fmt: skip
        try:
            program_output(tool, timeout_s=_TOOL_TIMEOUT_S)
        except OSError as error:
            raise ConfigError(
                f"cannot format Kafka's storage in {self._storage}: {error}; "
                "look for room and rights there"
            ) from error

    def _jars(self, progress: Progress) -> Path:
        """Where the broker's jars are; fetched once per user, into the cache."""
        version = kafka_version()
        cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = Path(cache_home, "tapeline", f"kafka-{version}")
        for folder in (self.folder / version, cache):
            if (folder / f"kafka_2.13-{version}.jar").is_file():
                return folder
        mvn = find_program("mvn", package="maven", wanted_for="fetching the Kafka broker")
        progress(f"fetching Kafka {version} with Maven into {cache}, once; about 45 MB")
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            _fetch_jars(mvn, cache)
        except OSError as error:
            raise ConfigError(
                f"cannot fetch Kafka {version} with Maven: {error}; look at the network, the proxy "
                "in ~/.m2/settings.xml and the room in XDG_CACHE_HOME"
            ) from error
        return cache


def _fetch_jars(mvn: str, target: Path) -> None:
    """All or nothing: the folder gets its name when it is complete, so two may fetch at once."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.") as draft:
        jars = Path(draft, "jars")
        pom = ops_folder() / "kafka" / "pom.xml"
        program_output(
            [mvn, "-q", "-B", "-f", str(pom), "dependency:copy-dependencies",
             f"-DoutputDirectory={jars}"],
            timeout_s=_MAVEN_TIMEOUT_S,
        )  # fmt: skip
        try:
            jars.rename(target)
        except OSError:
            if not target.is_dir():  # else somebody was faster, and theirs is as good
                raise


class RedisService(Service):
    """A redis-server that keeps the first-seen table in an append-only file."""

    name = "redis"
    start_timeout_s = 30.0
    stop_timeout_s = 10.0

    def endpoint(self) -> str:
        return self.settings.redis.url or ""

    def version(self) -> str:
        text = program_output([self._program(), "--version"], timeout_s=_TOOL_TIMEOUT_S)
        match = re.search(r"v=(\S+)", text)
        return match[1] if match else text.strip()

    def prepare(self, progress: Progress) -> None:
        self._program()
        (self.folder / "appendonly").mkdir(parents=True, exist_ok=True)

    def command(self) -> list[str]:
        return [
            self._program(),
            str(ops_folder() / "redis" / "redis.conf"),
            "--bind", "127.0.0.1",
            "--port", str(self.port),
            "--dir", str(self.folder / "appendonly"),
        ]  # fmt: skip

    def ping(self) -> str:
        return redis_version(self.endpoint())

    @staticmethod
    def _program() -> str:
        program = find_program(
            "redis-server", package="redis-server", wanted_for="the first-seen table"
        )
        return os.path.abspath(program)


def remove_folder(service: Service) -> None:
    """Deletes what the service keeps on disk. It must not be running."""
    assert service.record.live() is None
    if service.folder.exists():
        shutil.rmtree(service.folder)
