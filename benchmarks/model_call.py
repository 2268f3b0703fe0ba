"""What a call to the model costs through a Ray Serve handle, and how many windows it carries.

    python -m benchmarks.model_call [--sizes 1,128,2048] [--callers 4] [--in-flight 2] [--seconds 3]
        [--rounds 3] [--json]

Starts a Ray of its own with the model deployment that the settings describe, and another whose
replica does nothing with a call. Callers are processes of their own, as workers are; each keeps
some calls in flight, numpy in and numpy out. First one caller with one call in flight (latency),
then all of them (rate). Ways take turns within a round; medians over the rounds.

Where the time goes: *engine* is the same call made in this process, without Serve; *nothing* is the
way to a replica and back with the windows in memory that both see; *shared* is the whole; *value*
is the whole with the windows as an argument, through Ray's object store.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
from ray import serve

from inference.client import ModelDescription
from inference.deployment import build_model_deployment
from inference.engine import load_engine
from inference.remote import ServeInferencer
from inference.shared import BlockName, Mappings, Written
from schemas.settings import Settings, load_settings
from tapeline.app import ray_session
from tapeline.machine import this_machine

_WAYS = ("nothing", "shared", "value")


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls of one size, one way; milliseconds a call as its caller sees it."""

    way: str
    windows: int
    callers: int
    in_flight: int
    p50_ms: float
    p99_ms: float
    windows_per_s: float


class Nothing:
    """Answers at once."""

    def __init__(self, description: ModelDescription) -> None:
        self._description = description
        self._mappings = Mappings()

    async def describe(self) -> ModelDescription:
        return self._description

    async def infer_shared(
        self, name: BlockName, shape: tuple[int, int, int], model_version: str | None
    ) -> Written | None:
        if self._mappings.open(name) is None:
            return None
        return Written(shape[0], self._description.num_features, 0, "nothing")


class Caller:
    """One process with calls in flight."""

    def __init__(self, handles: dict[str, Any]) -> None:
        self._ways = {
            way: ServeInferencer(handles[way], share_memory=way != "value", timeout_s=60)
            for way in handles
        }

    async def call(self, way: str, size: int, in_flight: int, seconds: float) -> list[float]:
        """Milliseconds of each call that began within so many seconds."""
        model = await self._ways[way].describe()
        shape = (size, model.num_channels, model.num_steps)
        windows = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
        taken_ms: list[float] = []

        async def one_after_another(end_s: float, times_ms: list[float]) -> None:
            while (begun_s := time.perf_counter()) < end_s:
                await self._ways[way].infer(windows)
                times_ms.append(1000 * (time.perf_counter() - begun_s))

        for limit_s, times_ms in ((min(1.0, seconds), []), (seconds, taken_ms)):  # warm-up first
            end_s = time.perf_counter() + limit_s
            await asyncio.gather(*[one_after_another(end_s, times_ms) for _ in range(in_flight)])
        return taken_ms


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", default="1,32,128")
    parser.add_argument("--callers", type=int, default=2)
    parser.add_argument("--in-flight", type=int, default=2, help="of each caller")
    parser.add_argument("--seconds", type=float, default=3, help="of each way in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    settings = load_settings()
    sizes = [int(size) for size in options.sizes.split(",")]
    description, engines = _engine(settings, sizes, options.seconds)
    with ray_session(settings, log_to_driver=False):
        rounds = list(_through_serve(settings, description, sizes, options))
    found = [*engines, *(_median(list(same)) for same in zip(*rounds, strict=True))]
    if options.json:
        calls = [asdict(one) for one in found]
        print(json.dumps({"machine": str(this_machine()), "calls": calls}, indent=2))
        return
    print(f"{this_machine()}; {options.rounds} rounds\n")
    print("| windows | callers | in flight | way | p50 ms | p99 ms | windows/s |")
    print("| ---: | ---: | ---: | --- | ---: | ---: | ---: |")
    for one in sorted(found, key=lambda one: (one.windows, one.callers)):
        print(
            f"| {one.windows:,} | {one.callers} | {one.in_flight} | {one.way} "
            f"| {one.p50_ms:.2f} | {one.p99_ms:.2f} | {one.windows_per_s:,.0f} |"
        )


def _engine(
    settings: Settings, sizes: list[int], seconds: float
) -> tuple[ModelDescription, list[Calls]]:
    engine = load_engine(settings.model, settings.window)
    model = engine.describe()
    found = []
    for size in sizes:
        shape = (size, model.num_channels, model.num_steps)
        windows = np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)
        taken_ms: list[float] = []
        end_s = time.perf_counter() + seconds
        while (begun_s := time.perf_counter()) < end_s:
            engine.infer(windows)
            taken_ms.append(1000 * (time.perf_counter() - begun_s))
        found.append(_calls("engine", size, 1, 1, taken_ms, seconds))
    return model, found


def _through_serve(
    settings: Settings,
    description: ModelDescription,
    sizes: list[int],
    options: argparse.Namespace,
) -> Iterator[list[Calls]]:
    model = serve.run(
        build_model_deployment(settings.model, settings.serve, window=settings.window),
        name="model",
        route_prefix=None,
    )
    at_once: Any = serve.deployment(
        max_ongoing_requests=16,
        ray_actor_options={"num_cpus": 0.1},
        logging_config={"enable_access_log": False},
    )(Nothing)
    nothing = serve.run(at_once.bind(description), name="nothing", route_prefix=None)
    handles = {"nothing": nothing, "shared": model, "value": model}
    as_actor: Any = ray.remote(num_cpus=0.1)(Caller)
    callers = [as_actor.remote(handles) for _ in range(options.callers)]
    for _ in range(options.rounds):
        found = []
        for size in sizes:
            for asked, in_flight in ((callers[:1], 1), (callers, options.in_flight)):
                for way in _WAYS:
                    calls = [
                        one.call.remote(way, size, in_flight, options.seconds) for one in asked
                    ]
                    taken_ms = [ms for one in ray.get(calls) for ms in one]
                    found.append(
                        _calls(way, size, len(asked), in_flight, taken_ms, options.seconds)
                    )
        yield found


def _calls(
    way: str, size: int, callers: int, in_flight: int, taken_ms: list[float], seconds: float
) -> Calls:
    p50_ms, p99_ms = np.percentile(taken_ms, [50, 99])
    rate = size * len(taken_ms) / seconds
    return Calls(way, size, callers, in_flight, float(p50_ms), float(p99_ms), rate)


def _median(same: list[Calls]) -> Calls:
    first = same[0]
    return Calls(
        first.way,
        first.windows,
        first.callers,
        first.in_flight,
        statistics.median(one.p50_ms for one in same),
        statistics.median(one.p99_ms for one in same),
        statistics.median(one.windows_per_s for one in same),
    )


if __name__ == "__main__":
    main()
