"""What stepping back for the processor does when the model runs on it, too.

    python -m benchmarks.guard [--rate 100] [--beside 1500] [--neighbours 0,2] [--rounds 3] [--json]

Starts a broker and a Redis of its own and, in turn, a ``tapeline worker`` with ``guard.cpu`` off
and on, with the default CPU model. Each time background events are sent beside realtime ones (open
loop), more than the machine can take; alone, and beside busy processes that have nothing to do with
Tapeline. Realtime's latency is from an event's append, on the broker's clock, to the reading of its
feature on this machine; only the second half of each play counts, when the guard has done what it
can. Medians over the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from benchmarks.lanes.load import FIRST_LANE, Feed, in_turn, own_topics, play, read_back, warm_up
from benchmarks.tape import parts, processor, worker_metrics
from schemas.settings import Settings
from tapeline.machine import this_machine
from tapeline.processes import free_ports

_BESIDE = "background"
_MODES = ("off", "on")


@dataclass(frozen=True, slots=True)
class Play:
    """Figures of one play, or medians of several.

    Attributes:
        p50_ms, p99_ms: of realtime, from append to reading.
        realtime_hz, background_hz: features.
        cpu_ms: of the worker's process, for each feature of both lanes; of the whole play.
        used: of the machine's processor, at the guard's last look.
        halvings, lanes_held: the same.
    """

    p50_ms: float
    p99_ms: float
    realtime_hz: float
    background_hz: float
    cpu_ms: float
    used: float
    halvings: float
    lanes_held: float


class Case(NamedTuple):
    """What is compared."""

    num_neighbours: int
    mode: str


def main() -> None:
    """Runs what the command line asks for; prints a table, and JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="benchmarks.guard", description=__doc__)
    parser.add_argument("--rate", type=float, default=100, help="realtime events per second")
    parser.add_argument("--beside", type=float, default=1_500, help="background events per second")
    parser.add_argument("--neighbours", default="0,2", help="busy processes beside it")
    parser.add_argument("--seconds", type=float, default=20, help="of each play")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    machine = str(this_machine())
    plays: dict[Case, list[Play]] = {
        Case(int(num), mode): [] for num, mode in product(options.neighbours.split(","), _MODES)
    }
    with parts(metrics={"port": free_ports(1)[0]}) as settings:
        steady, beside = (
            Feed(settings, lane, int(rate_hz * options.seconds), rate_hz)
            for lane, rate_hz in ((FIRST_LANE, options.rate), (_BESIDE, options.beside))
        )
        for number in range(options.rounds):
            for mode in in_turn(_MODES, number, options.rounds):
                for case in [one for one in plays if one.mode == mode]:
                    plays[case].append(_play(settings, case, steady, beside, options.seconds))
    medians = {case: _median(some) for case, some in plays.items()}
    if options.json:
        rows = [case._asdict() | asdict(one) for case, one in medians.items()]
        print(json.dumps({"machine": machine, "rows": rows}, indent=2))
    else:
        print(f"{machine}; {options.rounds} rounds of {options.seconds:g} s\n\n{_table(medians)}")


def _play(settings: Settings, case: Case, steady: Feed, beside: Feed, seconds: float) -> Play:
    guard = settings.guard.model_copy(update={"cpu": case.mode == "on"})
    with own_topics(settings.model_copy(update={"guard": guard}), settings.lanes) as own:
        with processor(own) as process:
            warm_up(own, [steady, beside])
            with _neighbours(case.num_neighbours):
                before = process.cpu_times()
                passages = play(own, steady, [beside], seconds=seconds)
                after, seen = process.cpu_times(), _metrics(own)
        features = read_back(own, [steady, beside])
    until_us = max(one.feature_us for one in passages)
    begun_us = min(one.event_us for one in passages)
    half_us = (begun_us + until_us) // 2
    read_ms = [one.read_ms for one in passages if one.event_us >= half_us]
    num_played = sum(begun_us <= one.feature_us <= until_us for one in features)

    def rate_hz(lane: str) -> float:
        num = sum(one.lane == lane and half_us <= one.feature_us <= until_us for one in features)
        return num / ((until_us - half_us) / 1e6)

    p50_ms, p99_ms = np.percentile(read_ms, [50, 99]).tolist()
    cpu_s = after.user + after.system - before.user - before.system
    return Play(
        p50_ms,
        p99_ms,
        rate_hz(FIRST_LANE),
        rate_hz(_BESIDE),
        1000 * cpu_s / num_played,
        seen["tapeline_resource_used_ratio", "cpu"],
        seen["tapeline_guard_halvings", ""],
        sum(value for (name, _), value in seen.items() if name == "tapeline_lane_held"),
    )


@contextmanager
def _neighbours(number: int) -> Iterator[None]:
    """Processes that want a core each, for as long as the context lasts."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(number)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _metrics(settings: Settings) -> Mapping[tuple[str, str], float]:
    """The worker's, by name and the value of the first label."""
    return {
        (name, next(iter(labels.values()), "")): value
        for name, labels, value in worker_metrics(settings)
    }


def _median(plays: Sequence[Play]) -> Play:
    return Play(*map(statistics.median, zip(*map(astuple, plays), strict=True)))


def _table(medians: Mapping[Case, Play]) -> str:
    header = [
        "busy neighbours", "`guard.cpu`", "realtime p50 ms", "realtime p99 ms", "realtime/s",
        "background/s", "worker's CPU ms per feature", "processor in use", "halvings", "lanes held",
    ]  # fmt: skip
    lines = [header, ["---:", "---", *["---:"] * (len(header) - 2)]]
    for case, one in medians.items():
        rates = [one.p50_ms, one.p99_ms, one.realtime_hz, one.background_hz]
        lines.append(
            [
                str(case.num_neighbours),
                f"`{case.mode}`",
                *(f"{figure:.0f}" for figure in rates),
                f"{one.cpu_ms:.2f}",
                f"{one.used:.0%}",
                f"{one.halvings:g}",
                f"{one.lanes_held:g}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
