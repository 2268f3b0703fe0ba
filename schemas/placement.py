"""Which processor cores a thread or a process runs on."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from schemas.errors import ConfigError


def pin_thread(setting: str, cores: Sequence[int], thread_id: int = 0) -> None:
    """Has a thread, and those that it starts from now on, run on these cores and on no others.

    Args:
        setting: where the cores come from, for the error.
        cores: by number; none: all stays as it is.
        thread_id: the kernel's; 0 is the calling thread.

    Raises:
        ConfigError: one of the cores is not there, or not for this process; nothing has changed.
        ProcessLookupError: the thread has ended.
    """
    if not cores:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise ConfigError(f"settings: {setting}: only Linux lets a program choose; remove it")
    before = os.sched_getaffinity(thread_id)
    with suppress(OSError):  # not one of them is there; where some are, the kernel takes those
        os.sched_setaffinity(thread_id, cores)
    missing = sorted(set(cores) - os.sched_getaffinity(thread_id))
    if missing:
        os.sched_setaffinity(thread_id, before)
        raise ConfigError(
            f"settings: {setting}: core {', '.join(map(str, missing))} is not there, or not for "
            f"this process; this machine has {os.cpu_count()}, the first is 0"
        )


def pin_process(setting: str, cores: Sequence[int]) -> None:
    """``pin_thread`` for every thread of this process, and so for those still to come."""
    pin_thread(setting, cores)
    for task in Path("/proc/self/task").iterdir() if cores else ():
        with suppress(ProcessLookupError):  # it has ended meanwhile
            pin_thread(setting, cores, int(task.name))
