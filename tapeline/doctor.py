"""What this machine lacks to run Tapeline, and the command that mends it; changes nothing."""

import importlib.metadata
import os
import platform
import re
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from schemas.errors import ConfigError
from schemas.redis import RedisSettings
from schemas.settings import ENV_PREFIX, KafkaSettings, Settings
from tapeline.processes import program_output
from tapeline.services import JAVA_PACKAGE, MIN_JAVA_VERSION, java_version, redis_version
from tapeline.stack import names_default, with_stack_endpoints
from tapeline.topics import cluster_metadata, lane_topics

MIN_PYTHON = (3, 11)
MIN_FREE_MEMORY_BYTES = 2 * 1024**3  # broker 0.75 GB, Ray 0.7 GB, a CPU model 0.5 GB
MIN_FREE_DISK_BYTES = 5 * 1024**3
MIN_OPEN_FILES = 4096  # a broker holds three files and a socket or two per partition
_PROBE_TIMEOUT_S = 3.0

_EVERYTHING = "everything"
_LOCAL_STACK = "tapeline up"
_SERVING = "tapeline run, tapeline demo"
_MODEL = "tapeline run, tapeline worker"
_DUPLICATES = "duplicates across workers"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        required_for: the commands that do not work without it.
        found: what is there, in a few words.
        mend: the exact command; empty when all is well.
    """

    name: str
    ok: bool
    required_for: str
    found: str
    mend: str


def diagnose(settings: Settings) -> list[Finding]:
    """Every finding, good and bad, in the order in which one would mend them.

    Blocks for about three seconds for each endpoint that does not answer; raises nothing.
    """
    given = settings
    try:
        settings = with_stack_endpoints(given)
        stack = []
    except ConfigError as error:
        mend = f"rm -r {settings.state_dir}"
        stack = [Finding("stack", False, _LOCAL_STACK, str(error), mend)]
    return [
        _python(),
        _package("ray", _SERVING),
        _package("torch", _MODEL),
        _java(),
        _program("mvn", "maven", ["--version"]),
        _program("redis-server", "redis-server", ["--version"]),
        _memory(),
        _disk(settings.state_dir),
        _open_files(),
        *stack,
        *_kafka(settings, mend=_mend("kafka.bootstrap_servers", given.kafka)),
        *_redis_servers(settings, mend=_mend("redis.url", given.redis)),
    ]


def _mend(key: str, section: KafkaSettings | RedisSettings) -> str:
    """`tapeline up` starts nothing for an endpoint that the settings name."""
    variable = ENV_PREFIX + key.upper().replace(".", "__")
    if variable in os.environ:
        return f"unset {variable} && tapeline up"
    if names_default(section, key.partition(".")[2]):
        return "tapeline up"
    return f"remove {key} from the settings file, then `tapeline up`"


def _finding(name: str, ok: bool, required_for: str, found: str, mend: str) -> Finding:
    return Finding(name, ok, required_for, found, "" if ok else mend)


def _python() -> Finding:
    ok = tuple(map(int, platform.python_version_tuple()[:2])) >= MIN_PYTHON
    wanted = ".".join(map(str, MIN_PYTHON))
    return _finding(
        "python", ok, _EVERYTHING, platform.python_version(), f"uv venv --python {wanted}"
    )


def _package(name: str, required_for: str) -> Finding:
    """Asks the installed metadata: importing torch takes seconds and half a gigabyte."""
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        mend = "uv pip install --require-hashes -r requirements.lock"
        return Finding(name, False, required_for, "not installed", mend)
    return Finding(name, True, required_for, version, "")


def _java() -> Finding:
    home = os.environ.get("JAVA_HOME")
    java = shutil.which("java", path=str(Path(home, "bin"))) if home else None
    java = java or shutil.which("java")
    mend = f"apt-get install {JAVA_PACKAGE}"
    if java is None:
        return Finding("java", False, _LOCAL_STACK, "not found", mend)
    try:
        version = java_version(java)
    except OSError as error:
        return Finding("java", False, _LOCAL_STACK, str(error), mend)
    return _finding("java", version >= MIN_JAVA_VERSION, _LOCAL_STACK, f"{version} at {java}", mend)


def _program(name: str, package: str, version_arguments: list[str]) -> Finding:
    mend = f"apt-get install {package}"
    path = shutil.which(name)
    if path is None:
        return Finding(name, False, _LOCAL_STACK, "not found", mend)
    try:
        text = program_output([path, *version_arguments], timeout_s=20)
    except OSError as error:
        return Finding(name, False, _LOCAL_STACK, str(error), mend)
    version = re.search(r"\d+\.\d+\.\d+", text)
    return Finding(name, True, _LOCAL_STACK, f"{version[0] if version else 'found'} at {path}", "")


def _memory() -> Finding:
    free_bytes = psutil.virtual_memory().available
    return _finding(
        "memory",
        free_bytes >= MIN_FREE_MEMORY_BYTES,
        f"{_LOCAL_STACK}, {_SERVING}",
        f"{_gigabytes(free_bytes)} available",
        "ps aux --sort=-rss | head",
    )


def _disk(state_dir: Path) -> Finding:
    folder = state_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free_bytes = psutil.disk_usage(str(folder)).free
    return _finding(
        "disk",
        free_bytes >= MIN_FREE_DISK_BYTES,
        _LOCAL_STACK,
        f"{_gigabytes(free_bytes)} free at {folder}",
        "tapeline down --purge",
    )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    found = "unlimited" if unlimited else str(soft)
    raised = 65_536 if hard == resource.RLIM_INFINITY else hard
    return _finding(
        "open files",
        unlimited or soft >= MIN_OPEN_FILES,
        f"{_LOCAL_STACK}, {_SERVING}",
        found,
        f"ulimit -n {raised}",
    )


def _kafka(settings: Settings, *, mend: str) -> list[Finding]:
    name = f"kafka at {settings.kafka.bootstrap_servers}"
    try:
        metadata = cluster_metadata(settings, timeout_s=_PROBE_TIMEOUT_S)
    except ConfigError as error:
        return [
            Finding(name, False, _MODEL, _first_clause(error), mend),
            Finding("topics", False, _MODEL, "unknown, no broker answers", mend),
        ]
    wanted = [spec.name for spec in lane_topics(settings)]
    missing = [topic for topic in wanted if topic not in metadata.topics]
    found = f"{len(wanted) - len(missing)} of {len(wanted)}"
    if missing:
        found += f"; missing: {', '.join(missing)}"
    return [
        Finding(name, True, _MODEL, f"{len(metadata.brokers)} broker(s)", ""),
        _finding("topics", not missing, _MODEL, found, "tapeline topics --create"),
    ]


def _redis_servers(settings: Settings, *, mend: str) -> list[Finding]:
    if not settings.redis.url:
        return [Finding("redis", True, _DUPLICATES, "the settings do without it", "")]
    further = [
        _redis(f"redis.more_urls[{place}]", url, mend="start it, or take it out of the settings")
        for place, url in enumerate(settings.redis.more_urls)
    ]
    return [_redis("redis", settings.redis.url, mend=mend), *further]


def _redis(name: str, url: str, *, mend: str) -> Finding:
    try:
        version = redis_version(url, timeout_s=_PROBE_TIMEOUT_S)
    except ConfigError as error:
        return Finding(name, False, _DUPLICATES, _first_clause(error), mend)
    return Finding(name, True, _DUPLICATES, f"{version} answers", "")


def _first_clause(error: ConfigError) -> str:
    return str(error).partition(";")[0]


def _gigabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1024**3:.1f} GiB"
