"""What is in use of this machine: processor, memory and GPU, as fractions."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import structlog

_log = structlog.get_logger(__name__)


class ResourceUsage(NamedTuple):
    """What is in use, as fractions of what may be used; None: there is none, or it is unknown."""

    cpu: float
    memory: float
    gpu_memory: float | None = None
    gpu: float | None = None


class ResourceMeter:
    """Reads what is in use. Blocks for about a millisecond: call it off the event loop.

    - The processor: the cores that this process may run on (its affinity, a container's cpuset),
      since the last reading, whoever used them.
    - Memory: the machine's.
    - Of both, too, what the control group allows this process, which the machine's figures do not
      show: the fuller of the two counts.
    - GPU and its memory: the fullest GPU among those that ``CUDA_VISIBLE_DEVICES`` names, else of
      this machine; whoever used it. None without ``gpu``, and where no NVIDIA driver answers.

    Args:
        gpu: whether to look for one.
    """

    def __init__(self, *, gpu: bool) -> None:
        self._cores = allowed_cores()
        self._busy_s, self._all_s = self._cpu_seconds()
        self._group = ControlGroup()
        self._gpus = _open_gpus() if gpu else []

    def read(self) -> ResourceUsage:
        return ResourceUsage(
            max(self._cpu(), self._group.cpu()),
            max(psutil.virtual_memory().percent / 100, self._group.memory()),
            *self._gpu(),
        )

    def _cpu(self) -> float:
        # Not psutil.cpu_percent: it remembers its last reading by thread, and we may be on any.
        before_busy_s, before_all_s = self._busy_s, self._all_s
        self._busy_s, self._all_s = self._cpu_seconds()
        passed_s = self._all_s - before_all_s
        return min(max((self._busy_s - before_busy_s) / passed_s, 0.0), 1.0) if passed_s else 0.0

    def _cpu_seconds(self) -> tuple[float, float]:
        """Busy and in all, of the cores together, since the machine's start."""
        times = psutil.cpu_times(percpu=True)
        mine = [one for core, one in enumerate(times) if core in self._cores] or times
        # What virtual machines inside this one use is in ``user`` and ``nice`` already.
        all_s = sum(
            sum(one) - getattr(one, "guest", 0) - getattr(one, "guest_nice", 0) for one in mine
        )
        idle_s = sum(one.idle + getattr(one, "iowait", 0) for one in mine)
        return all_s - idle_s, all_s

    def _gpu(self) -> tuple[float | None, float | None]:
        """Memory, and the share of time in which a kernel ran."""
        if not self._gpus:
            return None, None
        import pynvml

        try:
            memory = [pynvml.nvmlDeviceGetMemoryInfo(gpu) for gpu in self._gpus]
            rates = [pynvml.nvmlDeviceGetUtilizationRates(gpu) for gpu in self._gpus]
        except pynvml.NVMLError as error:
            _log.warning("gpu_use_unknown", reason=str(error))
            self._gpus = []
            return None, None
        return max(float(one.used / one.total) for one in memory), max(
            float(one.gpu) / 100 for one in rates
        )


class _CpuUse(NamedTuple):
    used_s: float
    at_s: float


class ControlGroup:
    """What cgroup v2 allows this process: by its own group and by those around it.

    A reading is of the fullest group, 0 where none has a limit. Pages of files that the kernel can
    take back at once are not in use. cgroup v1 is not looked at.

    Args:
        root: where ``proc`` and ``sys`` are.
        clock: seconds that only go forward.
    """

    def __init__(self, root: Path = Path("/"), clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._folders = list(_groups(root))
        self._cpu_use = {folder: self._use_of_cpu(folder) for folder in self._folders}

    def cpu(self) -> float:
        """The part of the quota that was used since the last reading."""
        fullest = 0.0
        for folder, before in self._cpu_use.items():
            now = self._cpu_use[folder] = self._use_of_cpu(folder)
            num_cores = _quota_cores(folder)
            if num_cores and now.at_s > before.at_s:
                used_cores = (now.used_s - before.used_s) / (now.at_s - before.at_s)
                fullest = max(fullest, used_cores / num_cores)
        return min(fullest, 1.0)

    def _use_of_cpu(self, folder: Path) -> _CpuUse:
        return _CpuUse(_field(folder / "cpu.stat", "usage_usec") / 1e6, self._clock())

    def memory(self) -> float:
        """The part of the limit that is in use."""
        fullest = 0.0
        for folder in self._folders:
            limit = _words(folder / "memory.max")
            used = _words(folder / "memory.current")
            if used and limit and limit[0].isdecimal() and int(limit[0]):
                free = _field(folder / "memory.stat", "inactive_file")
                fullest = max(fullest, (int(used[0]) - free) / int(limit[0]))
        return min(fullest, 1.0)


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's group and of those around it, the innermost first."""
    top = root / "sys/fs/cgroup"
    lines = [line for line in _words(root / "proc/self/cgroup") if line.startswith("0::")]
    path = lines[0].removeprefix("0::/") if lines else ""
    folder = top / path  # in a container it may not exist there: then ``top`` is its own
    while folder != top:
        yield folder
        folder = folder.parent
    yield top


def _quota_cores(folder: Path) -> float | None:
    """How many cores the group may keep busy; None: as many as there are."""
    quota = _words(folder / "cpu.max")
    return int(quota[0]) / int(quota[1]) if quota and quota[0].isdecimal() else None


def _field(path: Path, name: str) -> int:
    """Of a file of names and numbers; 0 where it has none of that name."""
    words = _words(path)
    return int(words[words.index(name) + 1]) if name in words else 0


def _words(path: Path) -> list[str]:
    """Of a file of the kernel's; none where there is no such file."""
    try:
        return path.read_text().split()
    except OSError:
        return []


def allowed_cores() -> set[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _open_gpus() -> list[Any]:
    """NVML's names for the GPUs that count; none, and a line in the log, where it cannot tell."""
    try:
        import pynvml

        pynvml.nvmlInit()
        named = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        numbers = named or map(str, range(pynvml.nvmlDeviceGetCount()))
        return [_open_gpu(pynvml, one.strip()) for one in numbers]
    except ImportError:
        _log.warning("gpu_use_unknown", reason="nvidia-ml-py is not installed")
    except pynvml.NVMLError as error:
        _log.warning("gpu_use_unknown", reason=str(error))
    return []


def _open_gpu(nvml: Any, name: str) -> Any:
    """A GPU by its number or, as CUDA allows, by its UUID."""
    if name.isdecimal():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)
