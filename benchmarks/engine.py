"""Windows per second of the engine by batch size: ``python benchmarks/engine.py``.

Times ``Engine.infer`` of the default model, numpy in to numpy out, one call after the other. Every
row says the median call and the rate that follows from it.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from inference.engine import Engine
from inference.seeded import seeded_artifact

_SECONDS_PER_SIZE = 1.0
_MIN_CALLS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=1, help="torch's, on a CPU")
    parser.add_argument("--max-batch", type=int, default=256, help="the largest bucket")
    parser.add_argument("--sizes", type=int, nargs="*", help="batch sizes; default: the buckets")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()

    start_s = time.perf_counter()
    engine = Engine(
        seeded_artifact(),
        device=options.device,
        num_threads=options.threads,
        max_batch=options.max_batch,
    )
    warm_up_s = time.perf_counter() - start_s
    about = engine.statistics()
    sizes = options.sizes or [1, *(bucket.num_rows for bucket in about.buckets)]
    rows = [_measure(engine, size) for size in sizes]
    report = {
        "hardware": _hardware(about.device),
        "torch": torch.__version__,
        "device": about.device,
        "threads": options.threads,
        "model_version": about.model_version,
        "row_invariant": about.row_invariant,
        "buckets": [bucket.num_rows for bucket in about.buckets],
        "warm_up_s": round(warm_up_s, 2),
        "rows": rows,
    }
    if options.json:
        print(json.dumps(report))
        return
    for key in ("hardware", "torch", "device", "threads", "row_invariant", "buckets", "warm_up_s"):
        print(f"{key}: {report[key]}")
    print("windows a call | ms a call | windows/s")
    for row in rows:
        print(f"{row['windows']:14d} | {row['call_ms']:9.2f} | {row['windows_per_s']:9.0f}")


def _measure(engine: Engine, num_windows: int) -> dict[str, float]:
    shape = (num_windows, engine.describe().num_channels, engine.describe().num_steps)
    windows = np.random.default_rng(0).standard_normal(shape, np.float32)
    engine.infer(windows)
    times_s: list[float] = []
    end_s = time.perf_counter() + _SECONDS_PER_SIZE
    while len(times_s) < _MIN_CALLS or time.perf_counter() < end_s:
        start_s = time.perf_counter()
        engine.infer(windows)
        times_s.append(time.perf_counter() - start_s)
    call_s = statistics.median(times_s)
    return {
        "windows": num_windows,
        "call_ms": round(call_s * 1000, 3),
        "windows_per_s": round(num_windows / call_s, 1),
    }


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}"


if __name__ == "__main__":
    main()
