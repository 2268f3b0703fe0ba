"""What a call of an engine takes, numpy in and numpy out."""

import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from inference.artifact import Artifact, typical_windows
from inference.engine import Engine
from schemas.errors import ConfigError

_MIN_CALLS = 5
_WARM_UP_CALLS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Calls with so many windows, one after the other; a call ends when its result is in numpy.

    Attributes:
        windows_per_s: at the median call.
    """

    num_windows: int
    num_calls: int
    p50_ms: float
    p99_ms: float
    windows_per_s: float


def time_calls(
    engine: Engine, artifact: Artifact, num_windows: int, *, seconds: float = 1.0
) -> Timing:
    """Times calls for so long, at least five, after a warm-up, on seeded windows of the artifact's
    own scale.
    """
    windows = typical_windows(artifact.config, artifact.normalisation, num_windows, seed=2)
    for _ in range(_WARM_UP_CALLS):
        engine.infer(windows)
    calls_s: list[float] = []
    end_s = time.perf_counter() + seconds
    while len(calls_s) < _MIN_CALLS or time.perf_counter() < end_s:
        calls_s.append(_one_call_s(engine, windows))
    p50_s = statistics.median(calls_s)
    return Timing(
        num_windows,
        len(calls_s),
        round(p50_s * 1000, 4),
        round(float(np.percentile(calls_s, 99)) * 1000, 4),
        round(num_windows / p50_s, 1),
    )


def compare_calls(
    engines: Sequence[Engine], artifact: Artifact, num_windows: int, *, rounds: int = 15
) -> list[float]:
    """Median milliseconds of each engine's call; their calls take turns, so that they share
    whatever else the machine does.
    """
    windows = typical_windows(artifact.config, artifact.normalisation, num_windows, seed=2)
    calls_s: list[list[float]] = [[] for _ in engines]
    for number in range(_WARM_UP_CALLS + rounds):
        for engine, taken_s in zip(engines, calls_s, strict=True):
            call_s = _one_call_s(engine, windows)
            if number >= _WARM_UP_CALLS:
                taken_s.append(call_s)
    return [statistics.median(taken_s) * 1000 for taken_s in calls_s]


def _one_call_s(engine: Engine, windows: NDArray[np.float32]) -> float:
    begun_s = time.perf_counter()
    engine.infer(windows)
    return time.perf_counter() - begun_s


def plot_timings(timings: Sequence[Timing], title: str, path: Path) -> None:
    """Draws latency and throughput by windows in a call. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "a plot needs matplotlib; install it with `pip install matplotlib`, or ask for --csv"
        ) from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    calls = figure.subplots()
    sizes = [one.num_windows for one in timings]
    calls.plot(sizes, [one.p50_ms for one in timings], "o-", color="tab:blue", label="p50")
    calls.plot(sizes, [one.p99_ms for one in timings], "o--", color="tab:blue", label="p99")
    calls.set(yscale="log", xlabel="windows in a call", ylabel="ms a call")
    calls.set_xscale("log", base=2)
    rates = calls.twinx()
    label = "windows/s (right)"
    rates.plot(sizes, [one.windows_per_s for one in timings], "s-", color="tab:orange", label=label)
    rates.set(ylabel="windows/s", ylim=(0, None))
    lines = [*calls.get_lines(), *rates.get_lines()]
    calls.legend(lines, [str(line.get_label()) for line in lines], loc="upper left")
    calls.set_title(title, fontsize=8)
    figure.savefig(path, dpi=120)


def caption(engine: Engine, artifact: Artifact) -> dict[str, object]:
    """What a table of timings must say beside its figures."""
    about = engine.statistics()
    return {
        "hardware": hardware(about.device),
        "torch": torch.__version__,
        "model": artifact.model_version,
        "precision": artifact.precision,
        "row_invariant": about.row_invariant,
    }


def hardware(device: str) -> str:
    """The device in words, for a figure's caption."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}"
