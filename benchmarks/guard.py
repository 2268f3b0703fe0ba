"""Whether it helps to step back for the processor when the model runs on it, too.

    python -m benchmarks.guard [--rate 100] [--beside 1500] [--seconds 20] [--rounds 3] [--json]

Starts a broker and a Redis of its own and, in turn, a ``tapeline worker`` with ``guard.cpu`` off
and on, with the default CPU model. Each time background events are sent beside realtime ones (open
loop), more than the machine can take. Realtime's latency is from an event's append, on the broker's
clock, to the reading of its feature on this machine; only the second half of each play counts, when
the guard has done what it can. Medians over the rounds.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

import numpy as np

from benchmarks.lanes.load import FIRST_LANE, Feed, in_turn, own_topics, play, read_back, warm_up
from benchmarks.tape import parts, processor, this_machine
from schemas.settings import Settings

_BESIDE = "background"
_MODES = ("off", "on")


@dataclass(frozen=True, slots=True)
class Play:
    """Figures of one play, or medians of several.

    Attributes:
        p50_ms, p99_ms: of realtime, from append to reading.
        realtime_hz, background_hz: features.
        cpu_ms: of the worker's process, for each feature of both lanes; of the whole play.
    """

    p50_ms: float
    p99_ms: float
    realtime_hz: float
    background_hz: float
    cpu_ms: float


def main() -> None:
    """Runs what the command line asks for; prints a table, and JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="benchmarks.guard", description=__doc__)
    parser.add_argument("--rate", type=float, default=100, help="realtime events per second")
    parser.add_argument("--beside", type=float, default=1_500, help="background events per second")
    parser.add_argument("--seconds", type=float, default=20, help="of each play")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    machine = str(this_machine())
    plays: dict[str, list[Play]] = {mode: [] for mode in _MODES}
    with parts() as settings:
        steady, beside = (
            Feed(settings, lane, int(rate_hz * options.seconds), rate_hz)
            for lane, rate_hz in ((FIRST_LANE, options.rate), (_BESIDE, options.beside))
        )
        for number in range(options.rounds):
            for mode in in_turn(_MODES, number, options.rounds):
                plays[mode].append(_play(settings, mode, steady, beside, options.seconds))
    medians = {mode: _median(some) for mode, some in plays.items()}
    if options.json:
        report = {"machine": machine, "plays": {mode: asdict(one) for mode, one in medians.items()}}
        print(json.dumps(report, indent=2))
    else:
        print(f"{machine}; {options.rounds} rounds of {options.seconds:g} s\n\n{_table(medians)}")


def _play(settings: Settings, mode: str, steady: Feed, beside: Feed, seconds: float) -> Play:
    guard = settings.guard.model_copy(update={"cpu": mode})
    with own_topics(settings.model_copy(update={"guard": guard}), settings.lanes) as own:
        with processor(own) as process:
            warm_up(own, [steady, beside])
            before = process.cpu_times()
            passages = play(own, steady, [beside], seconds=seconds)
            after = process.cpu_times()
        features = read_back(own, [steady, beside])
    until_us = max(one.feature_us for one in passages)
    begun_us = min(one.event_us for one in passages)
    half_us = (begun_us + until_us) // 2
    read_ms = [one.read_ms for one in passages if one.event_us >= half_us]
    num_played = sum(begun_us <= one.feature_us <= until_us for one in features)

    def rate_hz(lane: str) -> float:
        num = sum(one.lane == lane and half_us <= one.feature_us <= until_us for one in features)
        return num / ((until_us - half_us) / 1e6)

    cpu_s = after.user + after.system - before.user - before.system
    p50_ms, p99_ms = np.percentile(read_ms, [50, 99]).tolist()
    return Play(p50_ms, p99_ms, rate_hz(FIRST_LANE), rate_hz(_BESIDE), 1000 * cpu_s / num_played)


def _median(plays: Sequence[Play]) -> Play:
    return Play(*map(statistics.median, zip(*map(astuple, plays), strict=True)))


def _table(medians: dict[str, Play]) -> str:
    lines = [
        "| `guard.cpu` | realtime p50 ms | realtime p99 ms | realtime/s | background/s "
        "| worker's CPU ms per feature |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mode, one in medians.items():
        figures = [one.p50_ms, one.p99_ms, one.realtime_hz, one.background_hz]
        cells = [f"`{mode}`", *(f"{figure:.0f}" for figure in figures), f"{one.cpu_ms:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
