"""Where figures come from."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True, slots=True)
class Machine:
    """Where figures come from."""

    cpu: str
    num_cores: int
    load_1m: float
    python: str

    def __str__(self) -> str:
        return (
            f"{self.num_cores} cores of {self.cpu}, load {self.load_1m:.1f} at the start, "
            f"Python {self.python}"
        )


def this_machine() -> Machine:
    """Its load too: figures of a busy machine are figures of that."""
    return Machine(
        _cpu_name(), psutil.cpu_count() or 0, os.getloadavg()[0], platform.python_version()
    )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
