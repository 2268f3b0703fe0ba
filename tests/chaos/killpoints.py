"""Where a worker may die: every await, commit and produce of an event's way, found in the code.

No list to keep: the statements are read from the sources, so a new boundary is a new kill point.
A tracer inside the worker's process kills it, by SIGKILL, just before or just after one of them.
"""

import ast
import os
import pickle
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from waiting import wait_until

import consumers
from chaos.workers import LONG_S, fork, run_child
from schemas.settings import Settings

FILES = (
    "worker.py", "model_stage.py", "intake.py", "assignments.py", "dedup.py", "bisection.py",
    "retry.py", "publisher.py", "transactions.py", "poller.py",
)  # fmt: skip
_CALLS = {
    "produce", "poll", "flush", "commit", "begin_transaction", "send_offsets_to_transaction",
    "commit_transaction", "abort_transaction", "init_transactions", "consume", "committed",
    "incremental_assign", "incremental_unassign", "seek", "close", "set_result", "finish",
    "let_go", "take_on", "put",
}  # fmt: skip
_FOLDER = Path(consumers.__file__).parent
_FILE_NAMES = {str(_FOLDER / name): name for name in FILES}

Side = Literal["before", "after"]
"""After: when the statement is done, and the next one of its function is about to begin."""
TraceFunction = Callable[[FrameType, str, Any], Any]


@dataclass(frozen=True, slots=True, order=True)
class Boundary:
    """A statement at which the worker hands something to somebody else, or waits for them."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}"


@dataclass(frozen=True, slots=True)
class KillPoint:
    """Die at a boundary, when it has been met ``after_hits`` times before."""

    boundary: Boundary
    side: Side
    after_hits: int

    def __str__(self) -> str:
        return f"{self.side} {self.boundary}, {self.after_hits} times met before"


@cache
def boundaries() -> tuple[Boundary, ...]:
    """All of them, in the order of the code."""
    found = {
        Boundary(name, statement.lineno, function.name)
        for name in FILES
        for function in ast.walk(ast.parse((_FOLDER / name).read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for statement in ast.walk(function)
        if isinstance(statement, ast.stmt) and any(map(_hands_over, _own_expressions(statement)))
    }
    return tuple(sorted(found))


def _own_expressions(statement: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement, without those of the statements inside it."""
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.expr | ast.withitem):
            yield from ast.walk(child)
    if isinstance(statement, ast.AsyncWith | ast.AsyncFor):
        yield statement


def _hands_over(node: ast.AST) -> bool:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in _CALLS
    return isinstance(node, ast.Await | ast.AsyncWith | ast.AsyncFor)


class Tracer:
    """Watches every thread of this process; counts the kill points it meets, and dies at one."""

    def __init__(self, kill: KillPoint | None) -> None:
        self.hits: Counter[tuple[Boundary, Side]] = Counter()
        self._kill = kill
        self._by_place = {(one.file, one.line): one for one in boundaries()}
        self._last_lines: dict[int, int] = {}  # by id of the frame

    def install(self) -> None:
        threading.settrace(self._enter)
        sys.settrace(self._enter)

    def _enter(self, frame: FrameType, event: str, argument: object) -> TraceFunction | None:
        if (name := _FILE_NAMES.get(frame.f_code.co_filename)) is None:
            return None
        if frame.f_lineno == frame.f_code.co_firstlineno:  # a new frame, not one that is resumed
            self._last_lines.pop(id(frame), None)
        return partial(self._trace, name)

    def _trace(self, name: str, frame: FrameType, event: str, argument: object) -> TraceFunction:
        last, line = self._last_lines.get(id(frame)), frame.f_lineno
        if event == "line" and line != last:
            self._last_lines[id(frame)] = line
            if last is not None:
                self._meet(self._by_place.get((name, last)), "after")
            self._meet(self._by_place.get((name, line)), "before")
        return partial(self._trace, name)

    def _meet(self, boundary: Boundary | None, side: Side) -> None:
        if boundary is None:
            return
        self.hits[boundary, side] += 1
        kill = self._kill
        if (
            kill is not None
            and (boundary, side) == (kill.boundary, kill.side)
            and self.hits[boundary, side] > kill.after_hits
        ):
            os.kill(os.getpid(), signal.SIGKILL)


class TracedWorker:
    """A worker with a tracer in it, forked.

    Without a kill point it only counts, and says what it has met when it is asked and at its end.
    """

    def __init__(self, settings: Settings, stem: Path, kill: KillPoint | None = None) -> None:
        self.log = stem.with_suffix(".log")
        self._started, self._hits = stem.with_suffix(".started"), stem.with_suffix(".hits")
        self._process = fork(_child, settings, self.log, self._started, self._hits, kill)

    @property
    def is_up(self) -> bool:
        return self._started.exists()

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, number)

    def join(self, timeout_s: float) -> int | None:
        """The exit code, once it has ended; None if it goes on."""
        self._process.join(timeout_s)
        return self._process.exitcode

    def met(self) -> Counter[tuple[Boundary, Side]]:
        """What it has met so far, if it lives, or in its life, and how often. Waits for it."""
        if self.exit_code is None:
            self.send(signal.SIGUSR1)
        hits: Counter[tuple[Boundary, Side]] = wait_until(
            lambda: self._hits.exists() and pickle.loads(self._hits.read_bytes()),
            LONG_S,
            "what a worker has met",
        )
        self._hits.unlink()
        return hits


def _child(
    settings: Settings, log: Path, started: Path, hits: Path, kill: KillPoint | None
) -> None:
    tracer = Tracer(kill)

    def note_hits(*_: object) -> None:
        draft = hits.with_suffix(".draft")
        draft.write_bytes(pickle.dumps(tracer.hits))
        draft.rename(hits)

    signal.signal(signal.SIGUSR1, note_hits)
    tracer.install()
    try:
        run_child(settings, log, started)
    finally:
        sys.settrace(None)
        note_hits()
