"""Workers as a process manager keeps them: started, watched, started again when they end."""

import asyncio
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from waiting import wait_until

from consumers.logs import configure_logging
from schemas.errors import ConfigError, TapelineError
from schemas.settings import Settings, as_environment
from tapeline.app import run_worker

LONG_S = 90.0
_MAX_OWN_DEATHS = 20  # in a row without a worker that came up: it is not the fault's doing
_RESTART_PAUSE_S = 0.5  # after a death of its own
_TICK_S = 0.02
_TRACEBACK = "Traceback (most recent call last)"
_STOPPING = '"worker_stopping"'  # SIGTERM was heard before anything else ended it

# A fork of a process that has torch loaded is ready in milliseconds; importing it takes seconds.
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(
    ["torch", "tapeline.app", "inference.engine", "consumers.worker", "chaos.loaded"]
)


def fork(target: Callable[..., None], *args: Any) -> ForkServerProcess:
    """A started process, forked from one that has the code of a worker loaded."""
    process = _FORKSERVER.Process(target=target, args=args, daemon=True)
    # The server takes its path from the environment; what it does not find there it silently skips.
    path = os.pathsep.join(filter(None, sys.path))
    with mock.patch.dict(os.environ, PYTHONPATH=path):
        process.start()
    return process


def run_child(settings: Settings, log: Path, started: Path) -> None:
    """What ``tapeline worker`` does, without the command line around it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    configure_logging()
    try:
        asyncio.run(run_worker(settings, on_started=started.touch))
    except TapelineError as error:
        print(f"tapeline: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except BaseException:
        traceback.print_exc()
        sys.exit(70)


class WorkerProcess:
    """One worker, forked or, with ``environment``, as the real command under these variables."""

    def __init__(
        self, settings: Settings, stem: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = stem.with_suffix(".log")
        self._started = stem.with_suffix(".started")
        self._process: ForkServerProcess | subprocess.Popen[bytes]
        self.is_stopped = False  # by SIGSTOP
        self.is_dismissed = False  # by SIGTERM
        if environment is None:
            self._process = fork(run_child, settings, self.log, self._started)
        else:
            with self.log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tapeline", "worker", "--json"],
                    env={**os.environ, **as_environment(settings), **environment},
                    stdout=output,
                    stderr=output,
                )

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal that killed it."""
        if isinstance(self._process, subprocess.Popen):
            return self._process.poll()
        return self._process.exitcode

    @property
    def is_up(self) -> bool:
        """Whether its loop has begun."""
        if isinstance(self._process, subprocess.Popen):
            return "worker started" in self.log.read_text(errors="replace")
        return self._started.exists()

    def send(self, number: signal.Signals) -> None:
        if self.exit_code is None:
            os.kill(self.pid, number)

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


class Fleet:
    """The workers of a drill, by slot. Whoever ends is started again, until it is dismissed.

    Attributes:
        ends: how workers ended: ``killed``, ``in order``, ``own death`` (a clear error).
        failures: ends that are nobody's right: an assert, a traceback, a code other than 0 after
            SIGTERM.
    """

    def __init__(
        self, settings: Settings, folder: Path, *, environment: Mapping[str, str] | None = None
    ) -> None:
        self._settings = settings
        self._folder = folder
        self._environment = environment
        self._slots: dict[int, WorkerProcess] = {}
        self._due_s: dict[int, float] = {}  # slots to be filled again, and when
        self._num_started = 0
        self._num_deaths_in_a_row = 0
        self.ends: Counter[str] = Counter()
        self.failures: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def slots(self) -> list[int]:
        return sorted(self._slots)

    def worker(self, slot: int) -> WorkerProcess:
        return self._slots[slot]

    def running(self) -> dict[int, WorkerProcess]:
        """Those whose loop has begun, by slot."""
        return {
            slot: worker
            for slot, worker in self._slots.items()
            if worker.exit_code is None and worker.is_up
        }

    def add(self, slot: int) -> None:
        """Fills a slot; returns at once."""
        assert slot not in self._slots
        self._num_started += 1
        named = {"instance_id": f"slot{slot}"}
        worker = self._settings.worker.model_copy(update=named)
        settings = self._settings.model_copy(update={"worker": worker})
        stem = self._folder / f"worker-{self._num_started:03d}-slot{slot}"
        self._slots[slot] = WorkerProcess(settings, stem, self._environment)

    def dismiss(self, slot: int) -> None:
        """SIGTERM, and waits for the end, which must be in order."""
        worker = self._slots[slot]
        if worker.exit_code is None:
            wait_until(
                lambda: worker.is_up or worker.exit_code is not None, LONG_S, "a worker to be up"
            )
        worker.is_dismissed = True
        worker.send(signal.SIGTERM)
        try:
            wait_until(lambda: worker.exit_code is not None, LONG_S, f"{worker.log} to end")
        except TimeoutError as error:
            self.failures.append(f"{error}\n{worker.last_words()}")
            worker.send(signal.SIGKILL)
        self._note(worker)
        del self._slots[slot]

    def tend(self) -> None:
        """Looks at every worker once and starts again who has ended."""
        now_s = time.monotonic()
        if any(worker.is_up for worker in self._slots.values()):
            self._num_deaths_in_a_row = 0
        for slot, worker in list(self._slots.items()):
            if worker.exit_code is None:
                continue
            was_killed = worker.exit_code == -signal.SIGKILL
            self._num_deaths_in_a_row += not was_killed
            assert self._num_deaths_in_a_row < _MAX_OWN_DEATHS, worker.last_words()
            self._note(worker)
            del self._slots[slot]
            self._due_s[slot] = now_s + (0 if was_killed else _RESTART_PAUSE_S)
        for slot, due_s in list(self._due_s.items()):
            if now_s >= due_s:
                del self._due_s[slot]
                self.add(slot)

    def run_for(self, seconds: float) -> None:
        """Lets it all go on for so long. The moment of a fault is a seed's choice, not a wait."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self.tend()
            time.sleep(_TICK_S)

    def wait_until_up(self) -> None:
        """Returns when every slot's loop has begun."""

        def up() -> bool:
            self.tend()
            return not self._due_s and len(self.running()) == len(self._slots)

        wait_until(up, LONG_S, "every worker to be up")

    def victim(self, chance: random.Random) -> WorkerProcess:
        """One that runs, once one does."""

        def found() -> list[WorkerProcess]:
            self.tend()
            return [worker for _, worker in sorted(self.running().items())]

        return chance.choice(wait_until(found, LONG_S, "a worker to be up"))

    def close(self) -> None:
        """Kills whoever is left: the end of a drill that failed."""
        for worker in self._slots.values():
            worker.send(signal.SIGKILL)
        self._slots.clear()

    def num_takeovers(self) -> int:
        """Partitions taken on at a committed offset: someone had worked on them before."""
        return sum(
            '"partition_assigned"' in line and '"live_from": 0,' not in line
            for log in self._folder.glob("*.log")
            for line in log.read_text(errors="replace").splitlines()
        )

    def _note(self, worker: WorkerProcess) -> None:
        code, log = worker.exit_code, worker.log.read_text(errors="replace")
        if _TRACEBACK in log or code == 70:
            self.failures.append(f"{worker.log.name} ended with {code}:\n{worker.last_words()}")
        elif code == -signal.SIGKILL:
            self.ends["killed"] += 1
        elif code == 0 and worker.is_dismissed:
            self.ends["in order"] += 1
        elif code in (1, 2) and not (worker.is_dismissed and _STOPPING in log):
            self.ends["own death"] += 1
        else:
            self.failures.append(f"{worker.log.name} ended with {code}:\n{worker.last_words()}")


def faked_clock(clock: Path) -> dict[str, str]:
    """The environment in which a program's wall clock is off by the seconds in the file ``clock``.

    The monotonic clock goes on as it is, as it does when an operator or NTP steps a clock. Raises
    FileNotFoundError that names the package to install.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        raise FileNotFoundError("the clock drill needs a C compiler: `apt-get install gcc`")
    library = clock.with_suffix(".so")
    source = Path(__file__).with_name("clock.c")
    subprocess.run(
        [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True
    )
    clock.write_text("0")
    return {"LD_PRELOAD": str(library), "CHAOS_CLOCK": str(clock)}
