"""A Ray cluster of several nodes on this machine, as a process that tests talk to.

    python -m nodes NUM_NODES

Prints its address, then a line of each node's raylet pid; a pid on stdin has that node killed, -9,
with all that runs on it. Ends with stdin. Nodes have two CPUs each, the head has none.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_STORE_BYTES = 80 << 20
_GO_S = 60.0


class Nodes:
    """The cluster, from outside."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.address = self._answer()
        self.raylets: list[int] = json.loads(self._answer())

    def kill(self, raylet: int) -> None:
        """Ends a node as a power cut would; returns when nothing of it runs any more."""
        processes = self.processes(raylet)
        self._say(str(raylet))
        assert self._answer() == "killed"
        psutil.wait_procs(processes, timeout=_GO_S)
        self.raylets.remove(raylet)

    @staticmethod
    def processes(raylet: int) -> list[psutil.Process]:
        """What runs on a node."""
        return psutil.Process(raylet).children(recursive=True)

    def replicas(self, raylet: int) -> list[str]:
        """The Serve replicas on a node, by the titles that Ray gives their processes."""
        titles = []
        for process in self.processes(raylet):
            with suppress(psutil.Error):
                titles.append(" ".join(process.cmdline()))
        return sorted(title for title in titles if "ServeReplica" in title)

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the cluster ended"
        return line


@contextmanager
def ray_nodes(num_nodes: int, log: Path) -> Iterator[Nodes]:
    """A running cluster; all of it ends with the context."""
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "nodes", str(num_nodes)],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield Nodes(process)
    finally:
        try:
            process.communicate(timeout=_GO_S)  # its stdin ends, and so does it
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _main() -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(shutdown_at_exit=False)
    common = {"object_store_memory": _STORE_BYTES, "include_dashboard": False}
    cluster.add_node(num_cpus=0, **common)
    by_pid = {}
    for _ in range(int(sys.argv[1])):
        node = cluster.add_node(num_cpus=2, **common)
        by_pid[node.all_processes["raylet"][0].process.pid] = node
    print(cluster.address, flush=True)
    print(json.dumps(list(by_pid)), flush=True)
    for line in sys.stdin:
        pid = int(line)
        for process in psutil.Process(pid).children(recursive=True):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        cluster.remove_node(by_pid.pop(pid), allow_graceful=False)
        print("killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    _main()
