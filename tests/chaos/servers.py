"""Brokers and a Redis that can be killed, starved and brought back, one by one."""

import base64
import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from waiting import wait_until

from schemas.settings import load_settings
from tapeline.processes import free_ports, program_output, spawn
from tapeline.services import KafkaService, RedisService, Service
from tapeline.topics import cluster_metadata

LONG_S = 90.0
SESSION_TIMEOUT_MS = 1_500
_FAST_NOTICE = {
    # KIP-848: the broker decides how soon a silent member is given up, 45 s unless told.
    "group.consumer.min.session.timeout.ms": 1_000,
    "group.consumer.session.timeout.ms": SESSION_TIMEOUT_MS,
    "group.consumer.min.heartbeat.interval.ms": 300,
    "group.consumer.heartbeat.interval.ms": 300,
}


class Server:
    """One server process of ours, with the faults it can have."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.process: psutil.Process | None = None

    def start(self, *, wait: bool = True) -> None:
        """Starts it on what it kept; with ``wait`` returns when it serves."""
        assert not self.is_running
        self.service.folder.mkdir(parents=True, exist_ok=True)
        self.service.prepare(lambda text: None)
        with self.service.console.open("ab") as console:
            self.process = spawn(self.service.command(), environment=os.environ, output=console)
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.is_running, " / ".join(self.service.last_words())
            return self.service.is_ready()

        wait_until(ready, LONG_S, f"{self.service.name} in {self.service.folder} to serve")

    @property
    def is_running(self) -> bool:
        if self.process is None or not self.process.is_running():
            return False
        return self.process.status() != psutil.STATUS_ZOMBIE

    def kill(self) -> None:
        """kill -9, and waits for its end."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.kill()
        self.process.wait(LONG_S)

    def terminate(self) -> None:
        """SIGTERM, and waits for its end; killed if it does not come."""
        assert self.process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.terminate()
        try:
            self.process.wait(LONG_S)
        except psutil.TimeoutExpired:
            self.kill()

    def stop(self) -> None:
        if self.is_running:
            self.terminate()


class _Node(KafkaService):
    """A broker and controller of a quorum of one or several."""

    def __init__(
        self,
        folder: Path,
        node_id: int,
        ports: Sequence[tuple[int, int]],
        cluster_id: str,
        storage: Path | None,
    ) -> None:
        port, controller_port = ports[node_id - 1]
        settings = load_settings(
            state_dir=folder / f"node{node_id}",
            kafka={"bootstrap_servers": f"127.0.0.1:{port}"},
        )
        super().__init__(settings, port=port, controller_port=controller_port)
        self._storage = storage or self._storage
        self._cluster_id = cluster_id
        copies, in_sync = len(ports), min(len(ports), 2)
        voters = ",".join(f"{i}@127.0.0.1:{ctl}" for i, (_, ctl) in enumerate(ports, start=1))
        self._overrides: dict[str, object] = {
            "node.id": node_id,
            "controller.quorum.voters": voters,
            "default.replication.factor": copies,
            "min.insync.replicas": in_sync,
            "offsets.topic.replication.factor": copies,
            "transaction.state.log.replication.factor": copies,
            "transaction.state.log.min.isr": in_sync,
            "share.coordinator.state.topic.replication.factor": copies,
            "share.coordinator.state.topic.min.isr": in_sync,
            # A dead broker is noticed in 3 s, not 9, and a silent follower in 5, not 30.
            "broker.session.timeout.ms": 3_000,
            "broker.heartbeat.interval.ms": 500,
            "replica.lag.time.max.ms": 5_000,
            "controlled.shutdown.enable": "true",
            **_FAST_NOTICE,
        }

    def write_properties(self) -> None:
        super().write_properties()
        lines = "".join(f"{key}={value}\n" for key, value in self._overrides.items())
        with self._properties.open("a") as properties:
            properties.write(f"\n# laid over it by the chaos suite\n{lines}")

    def _format(self) -> None:
        tool = self._java(
            "kafka.tools.StorageTool", "format", f"--cluster-id={self._cluster_id}",
            f"--config={self._properties}",
        )  # fmt: skip
        program_output(tool, timeout_s=LONG_S)


class Cluster:
    """Kafka of one node or three. With three: replication 3, min.insync.replicas 2."""

    def __init__(
        self, folder: Path, num_nodes: int, *, storages: dict[int, Path] | None = None
    ) -> None:
        """Starts nothing. ``storages``: node id to the folder of its log, elsewhere than ours."""
        numbers = free_ports(2 * num_nodes)
        ports = list(zip(numbers[::2], numbers[1::2], strict=True))
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        self.num_nodes = num_nodes
        self.bootstrap_servers = ",".join(f"127.0.0.1:{port}" for port, _ in ports)
        self.nodes = {
            node_id: Server(
                _Node(folder, node_id, ports, cluster_id, (storages or {}).get(node_id))
            )
            for node_id in range(1, num_nodes + 1)
        }

    def start(self) -> None:
        for node in self.nodes.values():
            node.start(wait=False)
        for node in self.nodes.values():
            node.wait_until_ready()
        self.wait_until_in_sync()

    def stop(self) -> None:
        for node in self.nodes.values():  # a quorum that leaves one by one waits for itself
            if node.is_running:
                node.kill()

    def leader(self, topic: str, partition: int) -> int:
        """The node that leads the partition, once one does."""

        def found() -> int:
            topics = self._metadata().topics
            return int(topics[topic].partitions[partition].leader) if topic in topics else 0

        return wait_until(lambda: max(found(), 0), LONG_S, f"a leader of {topic}:{partition}")

    def wait_until_in_sync(self) -> None:
        """Returns when every replica of every partition is in sync, our own topics and Kafka's."""

        def lagging() -> list[str]:
            metadata = self._metadata()
            if len(metadata.brokers) < self.num_nodes:
                return ["brokers"]
            return [
                f"{name}:{number}"
                for name, topic in metadata.topics.items()
                for number, partition in topic.partitions.items()
                if len(partition.isrs) < len(partition.replicas) or partition.leader < 0
            ]

        wait_until(lambda: not lagging(), LONG_S, "every replica to be in sync")

    def _metadata(self):
        settings = load_settings(kafka={"bootstrap_servers": self.bootstrap_servers})
        return cluster_metadata(settings)


class RedisServer(Server):
    """The first-seen table's server."""

    def __init__(self, folder: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"redis://127.0.0.1:{port}/0"
        settings = load_settings(state_dir=folder, redis={"url": self.url})
        super().__init__(RedisService(settings, port=port))

    def forget(self) -> None:
        """Deletes what it kept on disk; it must not run."""
        assert not self.is_running
        for path in (self.service.folder / "appendonly").rglob("*"):
            if path.is_file():
                path.unlink()


@contextlib.contextmanager
def small_disk(folder: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of that size, in memory. Raises PermissionError that names the missing right.

    Yields its folder.
    """
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tapeline-chaos", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PermissionError(
            "the disk drill mounts a tmpfs, which needs root or CAP_SYS_ADMIN: "
            f"{done.stderr.strip()}"
        )
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
