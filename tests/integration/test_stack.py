"""The native stack for real: a JVM, a redis-server, their files, their ports and their ends."""

import fcntl
import os
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import redis
from confluent_kafka import Consumer, Producer
from waiting import wait_until

from schemas.errors import ConfigError
from schemas.settings import Settings, load_settings
from tapeline import services
from tapeline.doctor import diagnose
from tapeline.processes import (
    ProcessRecord,
    RecordFile,
    find_program,
    free_ports,
    is_port_free,
    spawn,
)
from tapeline.stack import ServiceStatus, Stack, with_stack_endpoints
from tapeline.topics import TopicSpec, ensure_topics, lane_topics, topic_statuses

MakeSettings = Callable[..., Settings]


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("native")


@pytest.fixture(scope="module")
def own_stack(state_dir: Path) -> Iterator[Stack]:
    """A whole stack of this module's, up; not the one that other tests share."""
    stack = Stack.on_free_ports(load_settings(state_dir=state_dir))
    try:
        stack.up()
        yield stack
    finally:
        stack.down(purge=True)


@pytest.fixture
def lone_stack(tmp_path: Path) -> Iterator[Stack]:
    """One test's own, not started; whatever the test leaves running ends here."""
    stack = Stack.on_free_ports(load_settings(state_dir=tmp_path / "state"))
    yield stack
    if (tmp_path / "state").exists():
        stack.down()


def by_name(statuses: list[ServiceStatus]) -> dict[str, ServiceStatus]:
    return {status.name: status for status in statuses}


def test_up_serves_with_the_topics_of_every_lane(own_stack: Stack) -> None:
    statuses = by_name(own_stack.status())
    assert {status.state for status in statuses.values()} == {"running"}
    assert statuses["kafka"].version == services.kafka_version()
    topics = topic_statuses(own_stack.settings)
    assert len(topics) == 3 * len(own_stack.settings.active_lanes)
    assert {(topic.state, topic.num_partitions) for topic in topics} == {("exists", 4)}
    with redis.Redis.from_url(statuses["redis"].endpoint) as client:
        assert client.ping()
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-ttl"}


def test_up_again_changes_nothing(own_stack: Stack, state_dir: Path) -> None:
    before = by_name(own_stack.status())
    again = by_name(Stack(load_settings(state_dir=state_dir)).up())
    assert {name: status.pid for name, status in again.items()} == {
        name: status.pid for name, status in before.items()
    }
    assert {status.detail for status in again.values()} == {"was already up"}


def test_other_commands_find_the_stack_on_its_ports(own_stack: Stack, state_dir: Path) -> None:
    found = with_stack_endpoints(load_settings(state_dir=state_dir))
    assert found.kafka.bootstrap_servers == own_stack.settings.kafka.bootstrap_servers
    assert found.redis.url == own_stack.settings.redis.url


def test_restart_keeps_records_topics_and_marks(own_stack: Stack) -> None:
    settings = own_stack.settings
    topic = settings.active_lanes[0].topic
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap_servers})
    values = [f"record {i}".encode() for i in range(5)]
    for value in values:
        producer.produce(topic, value, partition=0)
    assert producer.flush(10) == 0
    assert settings.redis.url
    with redis.Redis.from_url(settings.redis.url) as client:
        client.set("tapeline:seen:a", "t:0:1")
        wait_until(
            lambda: client.info("persistence")["aof_pending_bio_fsync"] == 0, 10, "the fsync"
        )
    old_pids = {status.pid for status in own_stack.status()}

    new = [own_stack.restart("kafka"), own_stack.restart("redis")]

    assert {status.state for status in new} == {"running"}
    assert not old_pids & {status.pid for status in new}
    assert {topic.state for topic in ensure_topics(settings)} == {"exists"}
    for protocol in ("classic", "consumer"):  # KIP-848 is the second
        assert read_values(settings, topic, len(values), protocol=protocol) == values
    with redis.Redis.from_url(settings.redis.url) as client:
        assert client.get("tapeline:seen:a") == b"t:0:1"


def read_values(settings: Settings, topic: str, count: int, *, protocol: str) -> list[bytes | None]:
    """The first ``count`` values of partition 0, read by a group that has no offsets yet."""
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka.bootstrap_servers,
            "group.id": uuid.uuid4().hex,
            "group.protocol": protocol,
            "auto.offset.reset": "earliest",
        }
    )
    values: list[bytes | None] = []

    def poll() -> bool:
        message = consumer.poll(0.2)
        if message is not None and message.error() is None:
            values.append(message.value())
        return len(values) >= count

    try:
        consumer.subscribe([topic])
        wait_until(poll, 30, f"{count} records of {topic}")
    finally:
        consumer.close()
    return values


def test_topics_write_append_time_and_admit_large_records(own_stack: Stack) -> None:
    settings = own_stack.settings
    lane = settings.active_lanes[0]
    errors = []
    producer = Producer(
        {"bootstrap.servers": settings.kafka.bootstrap_servers, "message.max.bytes": 20_000_000}
    )
    timestamps = []

    def on_delivery(error: object, message: object) -> None:
        errors.append(error)
        timestamps.append(message.timestamp())  # type: ignore[attr-defined]

    for topic in (lane.topic, lane.dlq_topic):
        producer.produce(topic, bytes(10_000_000), timestamp=1000, on_delivery=on_delivery)
    assert producer.flush(30) == 0
    assert errors == [None, None]
    assert all(at_ms > 1_600_000_000_000 for _, at_ms in timestamps)


def test_a_topic_with_other_partitions_is_reported_and_left_alone(
    make_settings: MakeSettings,
) -> None:
    settings = make_settings()
    first, *rest = lane_topics(settings)
    odd = TopicSpec(first.name, 3, 1)
    assert [topic.state for topic in ensure_topics(settings, [odd])] == ["created"]
    statuses = ensure_topics(settings)
    assert [topic.state for topic in statuses] == ["mismatch", *("created" for _ in rest)]
    assert statuses[0].num_partitions == 3
    assert "TAPELINE_KAFKA__NUM_PARTITIONS=3" in statuses[0].detail


def test_too_many_replicas_is_one_sentence(make_settings: MakeSettings) -> None:
    settings = make_settings(kafka={"replication_factor": 3})
    with pytest.raises(ConfigError, match="lower TAPELINE_KAFKA__REPLICATION_FACTOR"):
        ensure_topics(settings)


def test_given_endpoints_are_used_and_left_alone(make_settings: MakeSettings, stack: Stack) -> None:
    """`up` with somebody else's broker and Redis starts nothing, makes topics, and ends nothing."""
    settings = make_settings()
    before = stack.status()
    other = Stack(settings)
    assert {(status.state, status.pid) for status in other.up()} == {("external", None)}
    assert {topic.state for topic in topic_statuses(settings)} == {"exists"}
    assert {status.state for status in other.down(purge=True)} == {"external"}
    assert stack.status() == before


def test_given_endpoints_that_do_not_answer_are_an_error(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    kafka = {"bootstrap_servers": f"127.0.0.1:{port}", "timeout_s": 1}
    settings = load_settings(state_dir=tmp_path, kafka=kafka)
    with pytest.raises(ConfigError, match=f"no Kafka broker answers at 127.0.0.1:{port}"):
        Stack(settings).up()
    settings = load_settings(state_dir=tmp_path, redis={"url": f"redis://:secret@127.0.0.1:{port}"})
    with pytest.raises(ConfigError, match=f"no Redis answers at redis://127.0.0.1:{port}"):
        Stack(settings).up()
    more_urls = [f"redis://127.0.0.1:{port}/1"]
    settings = load_settings(state_dir=tmp_path, redis={"more_urls": more_urls})
    with pytest.raises(ConfigError, match=f"no Redis answers at redis://127.0.0.1:{port}/1"):
        Stack(settings).up()
    assert not list(tmp_path.glob("*/process.json"))


@pytest.mark.parametrize("name", ["kafka", "redis"])
def test_a_taken_port_is_named_with_its_holder_and_nothing_starts(
    name: str, tmp_path: Path
) -> None:
    kafka_port, redis_port = free_ports(2)
    port = {"kafka": kafka_port, "redis": redis_port}[name]
    with socket.create_server(("127.0.0.1", port)):
        stack = Stack(
            load_settings(state_dir=tmp_path), kafka_port=kafka_port, redis_port=redis_port
        )
        with pytest.raises(ConfigError) as caught:
            stack.up()
    text = str(caught.value)
    assert f"port {port}, which {name} needs" in text
    assert f"kill {os.getpid()}" in text
    assert f"tapeline up --{name}-port" in text
    assert f"TAPELINE_{name.upper()}__" in text
    assert {status.state for status in stack.status()} == {"stopped"}
    assert not list(tmp_path.glob("*/process.json"))


@pytest.mark.parametrize(
    ("program", "package"),
    [("java", "openjdk-17-jre-headless"), ("redis-server", "redis-server"), ("mvn", "maven")],
)
def test_a_missing_program_is_named_with_its_package(
    program: str,
    package: str,
    lone_stack: Stack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A PATH that holds every program but the one."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for other in {"java", "redis-server", "mvn"} - {program}:
        (programs / other).symlink_to(find_program(other, package="", wanted_for=""))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name: services.ServiceName = "redis" if program == "redis-server" else "kafka"
    with pytest.raises(ConfigError, match=f"{program} is missing.*apt-get install {package}`"):
        lone_stack.start(name)
    (finding,) = [found for found in diagnose(lone_stack.settings) if found.name == program]
    assert not finding.ok
    assert finding.mend == f"apt-get install {package}"


def test_a_server_that_dies_at_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(services.RedisService):
        def command(self) -> list[str]:
            return [*super().command(), "--no-such-directive", "yes"]

    monkeypatch.setattr("tapeline.stack.RedisService", Broken)
    stack = Stack.on_free_ports(load_settings(state_dir=tmp_path))
    with pytest.raises(ConfigError, match=r"redis ended at once.*no-such-directive"):
        stack.start("redis")
    assert not list(tmp_path.glob("*/process.json"))


def test_down_ends_the_processes_and_frees_the_ports(lone_stack: Stack, tmp_path: Path) -> None:
    """Redis alone: the broker's end is `test_z_down_leaves_nothing_but_files`."""
    status = lone_stack.start("redis")
    assert status.pid
    assert psutil.Process(status.pid).terminal() is None
    assert os.getsid(status.pid) == status.pid, "a session of its own: no Ctrl-C of ours"
    port = int(status.endpoint.rsplit(":", 1)[1].split("/")[0])
    assert not is_port_free(port)
    ended = by_name(lone_stack.down())
    assert ended["redis"].detail == "ended"
    assert ended["kafka"].detail == "was not running"
    assert not psutil.pid_exists(status.pid)
    assert is_port_free(port)
    assert (tmp_path / "state" / "redis" / "appendonly").is_dir(), "its files stay"
    assert {status.detail for status in lone_stack.down(purge=True)} == {"was not running"}
    assert not (tmp_path / "state").exists(), "purge takes them"


def test_down_ends_no_stranger_that_got_the_pid(tmp_path: Path) -> None:
    """The kernel deals pids out again: a record of another moment is another process."""
    stranger = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        record = {
            "pid": stranger.pid,
            "create_time_s": psutil.Process(stranger.pid).create_time() - 60,
            "port": 1,
            "version": "7",
        }
        path = tmp_path / "redis" / "process.json"
        path.parent.mkdir()
        path.write_bytes(msgspec.json.encode(record))
        assert RecordFile(path).read() is not None
        assert {status.detail for status in Stack(load_settings(state_dir=tmp_path)).down()} == {
            "was not running"
        }
        assert stranger.poll() is None
        assert not path.exists()
    finally:
        stranger.communicate(b"\n", timeout=10)


def test_a_process_that_ignores_term_is_killed(tmp_path: Path) -> None:
    """Bounded: TERM, then KILL."""
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); "
    stubborn += "signal.pause()"
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = spawn([sys.executable, "-c", stubborn], environment=os.environ, output=output)
    wait_until(lambda: log.stat().st_size, 20, "the process to ignore TERM")
    file = RecordFile(tmp_path / "process.json")
    file.write(ProcessRecord(process.pid, process.create_time(), 1, "1"))
    assert file.stop(term_timeout_s=0.2)
    assert not psutil.pid_exists(process.pid)


def test_two_commands_at_once_are_refused(lone_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with (tmp_path / "state" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another `tapeline up` or `down` works on"):
            lone_stack.up()


def test_without_redis_the_stack_is_kafka_alone(tmp_path: Path) -> None:
    stack = Stack(load_settings(state_dir=tmp_path, redis={"url": None}))
    assert by_name(stack.status())["redis"].state == "off"


def test_doctor_finds_a_healthy_stack_healthy(own_stack: Stack, state_dir: Path) -> None:
    findings = {found.name: found for found in diagnose(load_settings(state_dir=state_dir))}
    for name in ("python", "ray", "torch", "java", "mvn", "redis-server", "topics", "redis"):
        assert findings[name].ok, findings[name]
        assert findings[name].mend == ""
    assert findings[f"kafka at {own_stack.settings.kafka.bootstrap_servers}"].ok


def test_doctor_names_what_is_down(make_settings: MakeSettings, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    missing_topics = {found.name: found for found in diagnose(make_settings())}["topics"]
    assert not missing_topics.ok
    assert missing_topics.mend == "tapeline topics --create"
    settings = load_settings(
        state_dir=tmp_path,
        kafka={"bootstrap_servers": f"127.0.0.1:{port}"},
        redis={
            "url": f"redis://127.0.0.1:{port}/0",
            "more_urls": [f"redis://127.0.0.1:{port}/1"],
        },
    )
    findings = {found.name: found for found in diagnose(settings)}
    for name in (f"kafka at 127.0.0.1:{port}", "redis"):
        assert not findings[name].ok
        assert "from the settings file, then `tapeline up`" in findings[name].mend
    assert findings["redis.more_urls[0]"].mend == "start it, or take it out of the settings"


def test_z_down_leaves_nothing_but_files(own_stack: Stack, state_dir: Path) -> None:
    """Last of the module: it ends the module's stack."""
    pids = [status.pid for status in own_stack.status()]
    ports = [port for name in ("kafka", "redis") for port in own_stack.ports(name)]
    assert all(pids)
    assert len(ports) == 3
    ended = own_stack.down()
    assert {(status.state, status.detail) for status in ended} == {("stopped", "ended")}
    assert not [pid for pid in pids if pid and psutil.pid_exists(pid)]
    assert all(is_port_free(port) for port in ports)
    assert not list(state_dir.glob("*/process.json"))
    assert (state_dir / "kafka" / "storage" / "meta.properties").exists()
    assert (state_dir / "kafka" / "logs" / "broker.log").stat().st_size > 0
