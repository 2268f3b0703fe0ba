"""Detached processes that outlive the command which started them, and end when they should.

Each leaves a record beside its log: pid, the moment the kernel created it, port and version. A
pid alone proves nothing, the kernel deals it out again; together with the time it names one
process.
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec
import psutil

from schemas.errors import ConfigError

_CREATE_TIME_SLACK_S = 0.05  # psutil derives it from boot time and clock ticks of 10 ms
_NUM_PORT_TRIES = 200
# Below the kernel's range for outgoing connections, so that none takes a port before we listen.
_FREE_PORTS = range(20_000, 32_000)


class ProcessRecord(msgspec.Struct, frozen=True):
    """One process that ``tapeline up`` started.

    Attributes:
        create_time_s: when the kernel created it; Unix epoch, seconds.
    """

    pid: int
    create_time_s: float
    port: int
    version: str

    def process(self) -> psutil.Process | None:
        """The live process, or None if it ended, even if its pid lives on in another one."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.create_time_s) > _CREATE_TIME_SLACK_S:
                return None
            if process.status() == psutil.STATUS_ZOMBIE:
                _reap(process)
                return None
            return process
        return None


@dataclass(frozen=True, slots=True)
class RecordFile:
    """Where one process is remembered between commands."""

    path: Path

    def read(self) -> ProcessRecord | None:
        """What was started here, alive or not. An unreadable record is a ConfigError."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=ProcessRecord)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.DecodeError) as error:
            raise ConfigError(
                f"cannot read {self.path}: {error}; delete it, after ending the process it names"
            ) from error

    def write(self, record: ProcessRecord) -> None:
        """Replaces the record; a reader sees the old one or the new one, never half of it."""
        draft = self.path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(record))
        draft.replace(self.path)

    def live(self) -> tuple[ProcessRecord, psutil.Process] | None:
        """The record and its process, if that very process still runs."""
        record = self.read()
        process = record.process() if record else None
        return (record, process) if record and process else None

    def stop(self, *, term_timeout_s: float, kill_timeout_s: float = 5) -> bool:
        """Ends the recorded process: TERM, then KILL. True if there was one to end.

        Blocks for at most the two timeouts. Raises ConfigError if it outlives even KILL.
        """
        found = self.live()
        if found is not None:
            _, process = found
            _end(process, term_timeout_s=term_timeout_s, kill_timeout_s=kill_timeout_s)
        self.path.unlink(missing_ok=True)
        return found is not None


def spawn(
    command: Sequence[str], *, environment: Mapping[str, str], output: IO[bytes]
) -> psutil.Process:
    """Starts ``command`` in a session of its own: no terminal, no Ctrl-C of ours reaches it.

    ``posix_spawn`` rather than ``Popen``, which warns about children nobody waits for.
    """
    pid = os.posix_spawn(
        command[0],
        list(command),
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
            (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
        ],
        setsid=True,
    )
    return psutil.Process(pid)


def find_program(name: str, *, package: str, wanted_for: str) -> str:
    """The path of an executable. Raises ConfigError that names the Debian package to install."""
    path = shutil.which(name)
    if path is None:
        raise ConfigError(
            f"{name} is missing, which {wanted_for} needs; "
            f"install it with `apt-get install {package}`"
        )
    return path


def program_output(command: Sequence[str], *, timeout_s: float) -> str:
    """What a short command prints on both streams; a command that fails or hangs is OSError."""
    try:
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=timeout_s, check=False, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise OSError(f"`{' '.join(command)}` did not end within {timeout_s:g} s") from error
    if result.returncode != 0:
        lines = result.stdout.strip().splitlines() or ["it printed nothing"]
        errors = [line for line in lines if "error" in line.lower()]
        raise OSError(f"`{command[0]}` ended with {result.returncode}: {(errors or lines[-1:])[0]}")
    return result.stdout


def is_port_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Connections of an ended server linger in TIME_WAIT; they keep nobody from listening.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def port_holder(port: int) -> psutil.Process | None:
    """Who listens on ``port``, as far as this user may know."""
    with contextlib.suppress(psutil.AccessDenied, psutil.NoSuchProcess):
        for connection in psutil.net_connections(kind="tcp"):
            address = connection.laddr
            if connection.status != psutil.CONN_LISTEN or not address or address.port != port:
                continue
            if connection.pid:  # None: another user's
                return psutil.Process(connection.pid)
    return None


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nobody listens now, in no order, all different."""
    found: list[int] = []
    for port in random.sample(_FREE_PORTS, _NUM_PORT_TRIES):
        if len(found) == count:
            break
        if is_port_free(port):
            found.append(port)
    assert len(found) == count
    return found


def _end(process: psutil.Process, *, term_timeout_s: float, kill_timeout_s: float) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.terminate()
        try:
            process.wait(term_timeout_s)
            return
        except psutil.TimeoutExpired:
            process.kill()
        try:
            process.wait(kill_timeout_s)
        except psutil.TimeoutExpired as error:
            raise ConfigError(
                f"process {process.pid} outlived KILL; see `ps -fp {process.pid}`"
            ) from error


def _reap(process: psutil.Process) -> None:
    """A dead child stays a zombie until its parent asks; only its parent can."""
    with contextlib.suppress(psutil.TimeoutExpired, psutil.NoSuchProcess):
        process.wait(0)
