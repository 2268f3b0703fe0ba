"""The real parts that tests stand on: a Kafka broker, a Redis and a Ray, each started once at need.

A part that is missing fails the tests that ask for it, with the command that mends it.
"""

import importlib.metadata
import logging
import os
import platform
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import redis as redis_client

from schemas.lanes import DEFAULT_LANES
from schemas.settings import ENV_PREFIX, Settings, load_settings
from tapeline.processes import free_ports
from tapeline.services import ServiceName, kafka_version
from tapeline.stack import ServiceStatus, Stack

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A replica that cannot be built fails again each time; one try takes half a minute here.
os.environ["RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT"] = "1"
# Ray's own variables of a cluster somewhere must not draw the tests there.
os.environ.pop("RAY_ADDRESS", None)
# The tests decide every setting; a variable of the developer's shell would change what they test.
for _variable in [name for name in os.environ if name.startswith(ENV_PREFIX)]:
    del os.environ[_variable]

# Bookings, not cores: replicas book fractions and share what the machine has.
RAY_NUM_CPUS = 4

_VERSIONS = pytest.StashKey[dict[str, str]]()
_BROKER_LOG = pytest.StashKey[Path]()
_NUM_WARNINGS = 20
MakeSettings = Callable[..., Settings]


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_VERSIONS] = {}


def pytest_report_header() -> list[str]:
    return [
        f"tapeline tests on Python {platform.python_version()}, Kafka {kafka_version()} (native), "
        f"Ray {importlib.metadata.version('ray')}, torch {importlib.metadata.version('torch')}"
    ]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One of several processes (``pytest -n``) tells the one that reports what it used."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["versions"] = session.config.stash[_VERSIONS]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Beside a test that failed stands what the broker had to say."""
    report = yield
    log = item.config.stash.get(_BROKER_LOG, None)
    if report.failed and log and log.is_file():
        lines = log.read_text(errors="replace").splitlines()
        warnings = [line for line in lines if " WARN " in line or " ERROR " in line]
        report.sections.append(("Kafka's warnings", "\n".join(warnings[-_NUM_WARNINGS:])))
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[_VERSIONS].update(getattr(node, "workeroutput", {}).get("versions", {}))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """What really ran, asked of the running parts themselves."""
    terminalreporter.section("real parts used")
    versions = config.stash[_VERSIONS]
    for name in ("kafka", "redis", "ray"):
        terminalreporter.line(f"{name}: {versions.get(name, 'not used by these tests')}")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Kafka and Redis on free ports, not yet started; all of it ends with the tests."""
    settings = load_settings(state_dir=tmp_path_factory.mktemp("stack"))
    stack = Stack.on_free_ports(settings)
    try:
        yield stack
    finally:
        stack.down(purge=True)


@pytest.fixture(scope="session")
def kafka(stack: Stack, request: pytest.FixtureRequest) -> str:
    """A running broker's bootstrap servers; no topics in it yet."""
    request.config.stash[_BROKER_LOG] = stack.settings.state_dir / "kafka" / "logs" / "broker.log"
    return _started(stack, "kafka", request.config).endpoint


@pytest.fixture(scope="session")
def redis_url(stack: Stack, request: pytest.FixtureRequest) -> str:
    """A running Redis; tests share it, each with key prefixes of its own."""
    return _started(stack, "redis", request.config).endpoint


@pytest.fixture
def redis(redis_url: str) -> Iterator["redis_client.Redis"]:
    """A client of that Redis."""
    with redis_client.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture(scope="session")
def stack_versions(kafka: str, redis_url: str, request: pytest.FixtureRequest) -> dict[str, str]:
    """Name to version and endpoint of the parts that run."""
    return request.config.stash[_VERSIONS]


@pytest.fixture
def make_settings(kafka: str, redis_url: str, tmp_path: Path) -> MakeSettings:
    """Makes settings for the running broker and Redis, with names that no other test has.

    Takes what ``load_settings`` takes. Topics, groups and Redis keys of every lane carry a fresh
    prefix per call; no topic exists yet (``tapeline.topics.ensure_topics`` makes them).
    """
    return _settings_maker(kafka, redis_url, tmp_path)


@pytest.fixture(scope="module")
def make_module_settings(
    kafka: str, redis_url: str, tmp_path_factory: pytest.TempPathFactory
) -> MakeSettings:
    """The same for what the tests of a module share."""
    return _settings_maker(kafka, redis_url, tmp_path_factory.mktemp("module"))


def _settings_maker(kafka: str, redis_url: str, folder: Path) -> MakeSettings:
    def make(**overrides: Any) -> Settings:
        unique = f"t{uuid.uuid4().hex[:10]}"
        ours: dict[str, Any] = {
            "kafka": {"bootstrap_servers": kafka},
            "redis": {"url": redis_url, "key_prefix": f"{unique}:seen:"},
            "state_dir": folder / "state",
        }
        lanes = dict(overrides.pop("lanes", {}))
        ours["lanes"] = {
            name: {
                "topic": f"{unique}.{name}",
                "output_topic": f"{unique}.features.{name}",
                "group": f"{unique}.{name}",
                **lanes.get(name, {}),
            }
            for name in [*DEFAULT_LANES, *(name for name in lanes if name not in DEFAULT_LANES)]
        }
        for key, value in overrides.items():
            under = ours.get(key)
            ours[key] = {**under, **value} if isinstance(under, Mapping) else value
        return load_settings(**ours)

    return make


@pytest.fixture
def settings(make_settings: MakeSettings) -> Settings:
    """Settings of one test, all lanes, nothing overridden."""
    return make_settings()


@pytest.fixture(scope="session")
def ray_runtime(request: pytest.FixtureRequest) -> Iterator[int]:
    """A Ray of our own with Serve in it, without dashboard; the port of its HTTP proxy.

    Its processes find the tests' own models.
    """
    import ray
    from ray import serve

    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [before, str(Path(__file__).parent)]))
    ray.init(
        address="local",  # never a cluster that happens to run here
        num_cpus=RAY_NUM_CPUS,
        object_store_memory=256 * 1024**2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
    )
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    try:
        [port] = free_ports(1)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        address = ray.get_runtime_context().gcs_address
        request.config.stash[_VERSIONS]["ray"] = f"{ray.__version__} with Serve at {address}"
        yield port
    finally:
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _started(stack: Stack, name: ServiceName, config: pytest.Config) -> ServiceStatus:
    status = stack.start(name)
    assert status.state == "running", status
    config.stash[_VERSIONS][name] = f"{status.version} at {status.endpoint}, pid {status.pid}"
    return status
