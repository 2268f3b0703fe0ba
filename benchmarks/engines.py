"""Several engines on one device, a process each: what they make together, and with how many cores.

    python -m benchmarks.engines [--engines 1 --engines 8] [--windows 512] [--pause-ms 2]
        [--seconds 4] [--json]

As workers that hold the model themselves (`tapeline worker`) share a GPU. Device, threads, the
largest batch and the artifact are the settings'; ``model.gpu_wait`` is tried both ways. Each engine
is asked for the same windows again and again, with a pause between two calls.
"""

import argparse
import json
import time
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

from benchmarks.tape import print_rows
from inference.artifact import typical_windows
from inference.engine import load_engine
from inference.seeded import seeded_artifact
from schemas.settings import ModelSettings, load_settings
from tapeline.machine import this_machine

_START_S = 120.0


class _Calls(NamedTuple):
    """One engine's: seconds of each, how long they took together, and cores meanwhile."""

    call_s: list[float]
    elapsed_s: float
    cores: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", type=int, action="append")
    parser.add_argument("--windows", type=int, default=512)
    parser.add_argument("--pause-ms", type=float, default=2.0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    settings = load_settings().model
    rows = [
        _measure(settings.model_copy(update={"gpu_wait": wait}), number, options)
        for number in options.engines or [1, 2]
        for wait in (("spin", "sleep") if settings.device == "cuda" else ("spin",))
    ]
    if options.json:
        print(json.dumps({"machine": str(this_machine()), "rows": rows}, indent=2))
        return
    print(f"{this_machine()}; {options.windows} windows a call\n")
    print_rows(rows)


def _measure(settings: ModelSettings, number: int, options: argparse.Namespace) -> dict[str, Any]:
    context = get_context("spawn")
    found, start = context.Queue(), context.Barrier(number)
    arguments = (settings, options.windows, options.pause_ms / 1000, options.seconds, start, found)
    processes = [context.Process(target=_ask, args=arguments) for _ in range(number)]
    for process in processes:
        process.start()
    calls = [found.get(timeout=_START_S + options.seconds) for _ in processes]
    for process in processes:
        process.join()
    call_ms = 1000 * np.concatenate([one.call_s for one in calls])
    rate = sum(len(one.call_s) * options.windows / one.elapsed_s for one in calls)
    return {
        "engines": number,
        "gpu_wait": settings.gpu_wait,
        "windows/s": f"{rate:,.0f}",
        "p50 ms": f"{np.percentile(call_ms, 50):.1f}",
        "p99 ms": f"{np.percentile(call_ms, 99):.1f}",
        "cores": f"{sum(one.cores for one in calls):.1f}",
    }


def _ask(
    settings: ModelSettings,
    num_windows: int,
    pause_s: float,
    seconds: float,
    start: Any,
    found: Any,
) -> None:
    engine = load_engine(settings)
    model = seeded_artifact()
    windows = typical_windows(model.config, model.normalisation, num_windows, seed=0)
    engine.infer(windows)
    start.wait(_START_S)
    call_s: list[float] = []
    begun_s, used_s = time.perf_counter(), time.process_time()
    while time.perf_counter() - begun_s < seconds:
        asked_s = time.perf_counter()
        engine.infer(windows)
        call_s.append(time.perf_counter() - asked_s)
        time.sleep(pause_s)
    elapsed_s = time.perf_counter() - begun_s
    found.put(_Calls(call_s, elapsed_s, (time.process_time() - used_s) / elapsed_s))


if __name__ == "__main__":
    main()
