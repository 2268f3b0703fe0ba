"""One event at a time: does it wait for anything but its turn?"""

import argparse
import statistics
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import psutil

from benchmarks.lanes.load import FIRST_LANE, Feed, in_turn, own_topics, play, warm_up
from benchmarks.tape import Passage, module_process, parts, processor
from inference.engine import Engine, load_engine
from schemas.settings import Settings
from schemas.timing import STAGES
from tapeline.machine import this_machine

WORKER, RUN, BATCHED, UNTIMED = "worker", "run", "serve-batch-10ms", "serve-batch-0ms"
MODES = (WORKER, RUN, BATCHED, UNTIMED)
_NAMES = {
    WORKER: "`tapeline worker`",
    RUN: "`tapeline run` (Ray Serve)",
    BATCHED: "`@serve.batch`, 10 ms",
    UNTIMED: "`@serve.batch`, 0 ms",
}
_WAIT_S = {BATCHED: "0.01", UNTIMED: "0"}
_UNCOUNTED_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class LowLoad:
    """What a run showed.

    Attributes:
        model_ms: the engine's own time for one window, called at the same rate in a process that
            does nothing else.
        plays: by mode, the counted passages of each round.
    """

    machine: str
    rate_hz: float
    seconds: float
    model_ms: float
    plays: Mapping[str, list[list[Passage]]]

    def read_ms(self, mode: str, percentile: float) -> float:
        """Median over the rounds."""
        return statistics.median(
            float(np.percentile([one.read_ms for one in passages], percentile))
            for passages in self.plays[mode]
        )

    def stage_ms(self, mode: str, stage: str) -> float | None:
        """p50, median over the rounds; None where the processor does not say."""
        rounds = [
            [one.stages_ms[stage] for one in passages if stage in one.stages_ms]
            for passages in self.plays[mode]
        ]
        return statistics.median(map(statistics.median, rounds)) if all(rounds) else None


def run(options: argparse.Namespace) -> LowLoad:
    """Every mode once a round, in another order each time."""
    machine = str(this_machine())
    with parts(worker={"timing_header": True}) as settings:
        model_ms = _model_ms(load_engine(settings.model, settings.window), options.rate)
        num_events = int(options.rate * options.seconds)
        feed = Feed(settings, FIRST_LANE, num_events, options.rate)
        feed.play = [one._replace(at_s=i / options.rate) for i, one in enumerate(feed.play)]
        plays: dict[str, list[list[Passage]]] = {mode: [] for mode in MODES}
        for number in range(options.rounds):
            for mode in in_turn(MODES, number, options.rounds):
                plays[mode].append(_play(settings, mode, feed, options.seconds))
    return LowLoad(machine, options.rate, options.seconds, model_ms, plays)


def _model_ms(engine: Engine, rate_hz: float, num_calls: int = 100) -> float:
    """Median of calls with one window, so far apart as events are: caches have cooled."""
    description = engine.describe()
    window = np.zeros((1, description.num_channels, description.num_steps), np.float32)
    times_s = []
    for _ in range(num_calls):
        time.sleep(1 / rate_hz)
        begun_s = time.perf_counter()
        engine.infer(window)
        times_s.append(time.perf_counter() - begun_s)
    return statistics.median(times_s) * 1000


def _play(settings: Settings, mode: str, feed: Feed, seconds: float) -> list[Passage]:
    with own_topics(settings, settings.lanes) as own, _process(own, mode):
        warm_up(own, [feed])
        passages = play(own, feed, seconds=seconds)
    return passages[int(len(passages) * _UNCOUNTED_SHARE) :]


def _process(settings: Settings, mode: str) -> AbstractContextManager[psutil.Process]:
    if mode in _WAIT_S:
        return module_process(settings, ("benchmarks.lanes.peer", _WAIT_S[mode]))
    return processor(settings, mode)


def report(found: LowLoad) -> dict[str, object]:
    """The figures, for JSON."""
    return {
        "machine": found.machine,
        "rate_hz": found.rate_hz,
        "seconds": found.seconds,
        "model_ms": found.model_ms,
        "modes": {
            mode: {
                **{f"p{which}_ms": found.read_ms(mode, which) for which in (50, 95, 99)},
                "stages_ms": {stage: found.stage_ms(mode, stage) for stage in STAGES[:-1]},
            }
            for mode in found.plays
        },
    }


def table(found: LowLoad) -> str:
    """The figures, for people."""
    rounds = f"{len(found.plays[WORKER])} rounds of {found.seconds:g} s"
    lines = [
        f"{found.machine}; {rounds} at {found.rate_hz:g} events/s",
        f"the model alone, one window at this rate: {found.model_ms:.1f} ms",
        "",
        f"| | p50 ms | p95 ms | p99 ms | p50 beyond the model | {' | '.join(STAGES[:-1])} |",
        f"| --- {'| ---: ' * (4 + len(STAGES[:-1]))}|",
    ]
    for mode in MODES:
        figures = [found.read_ms(mode, which) for which in (50, 95, 99)]
        stages = [found.stage_ms(mode, stage) for stage in STAGES[:-1]]
        cells = [f"{ms:.1f}" for ms in (*figures, figures[0] - found.model_ms)]
        cells += ["" if ms is None else f"{ms:.1f}" for ms in stages]
        lines.append(f"| {_NAMES[mode]} | {' | '.join(cells)} |")
    return "\n".join(lines)
