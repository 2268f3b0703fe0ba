"""On which cores worker and model run, and with how many threads: what it changes.

    python -m benchmarks.placement [--rate 250] [--seconds 10] [--backlog 5000] [--rounds 3]

Starts a broker and a Redis of its own and, one after the other, a ``tapeline worker`` with the
default CPU model for each placement; each round has all of them, in another order. Events of a
simulated market arrive at a set rate (open loop), then as a backlog. Latency is from the event's
append to the feature's, both on the broker's clock (LogAppendTime, in ms). Everything shares the
machine: broker, Redis, worker, model, producer and subscriber; only worker and model are placed.

Medians over the rounds. Ratios are to the first placement in the same round. Needs two cores.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import numpy as np
import psutil

from benchmarks.tape import Tape, parts, processor
from schemas.settings import Settings
from tapeline.machine import this_machine

_UNCOUNTED_SHARE = 0.2  # of each play, at its beginning


@dataclass(frozen=True, slots=True)
class Placement:
    """Cores by number. None: any for the worker, the worker's for the model."""

    worker: tuple[int, ...] = ()
    model: tuple[int, ...] = ()
    num_threads: int = 1

    def settings(self, settings: Settings) -> Settings:
        worker = settings.worker.model_copy(update={"cpu_affinity": list(self.worker)})
        update = {"cpu_affinity": list(self.model), "num_threads": self.num_threads}
        model = settings.model.model_copy(update=update)
        return settings.model_copy(update={"worker": worker, "model": model})


PLACEMENTS = (
    Placement(),
    Placement(num_threads=2),
    Placement(model=(1,)),
    Placement(worker=(0,), model=(1,)),
    Placement(worker=(0,), model=(0, 1), num_threads=2),
    Placement(worker=(0,)),
)


@dataclass(frozen=True, slots=True)
class Play:
    """Figures of one play, or medians of several.

    Attributes:
        capacity_hz: features per second while a backlog is worked off, over its middle 80 %.
        num_kafka_threads: librdkafka's own, in the worker's process.
    """

    p50_ms: float
    p99_ms: float
    capacity_hz: float
    num_kafka_threads: float


def main() -> None:
    """Runs what the command line asks for; prints a table, and JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="benchmarks.placement", description=__doc__)
    parser.add_argument("--rate", type=float, default=250, help="events per second")
    parser.add_argument("--seconds", type=float, default=10, help="at that rate, in each round")
    parser.add_argument("--backlog", type=int, default=5_000, help="events")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if (psutil.cpu_count() or 0) < 2:
        parser.error("there is one core alone; nothing can be placed elsewhere")

    machine = str(this_machine())
    plays: dict[Placement, list[Play]] = {placement: [] for placement in PLACEMENTS}
    with parts() as settings:
        tape = Tape(settings)
        for number in range(options.rounds):
            turn = number * len(PLACEMENTS) // options.rounds
            for placement in [*PLACEMENTS[turn:], *PLACEMENTS[:turn]]:
                with processor(placement.settings(settings)) as process:
                    tape.warm_up()
                    plays[placement].append(_play(tape, process, options))
    if options.json:
        rows = [
            asdict(one) | {"rounds": [asdict(play) for play in plays[one]]} for one in PLACEMENTS
        ]
        print(json.dumps({"machine": machine, "placements": rows}, indent=2))
    else:
        print(f"{machine}; {options.rounds} rounds, {options.rate:g} events/s\n\n{_table(plays)}")


def _play(tape: Tape, process: psutil.Process, options: argparse.Namespace) -> Play:
    passages = tape.play(int(options.rate * options.seconds), options.rate)
    counted = passages[int(len(passages) * _UNCOUNTED_SHARE) :]
    latencies_ms = [(one.feature_us - one.event_us) / 1000 for one in counted]
    p50_ms, p99_ms = np.percentile(latencies_ms, [50, 99]).tolist()
    times_us = sorted(one.feature_us for one in tape.play(options.backlog, 1e9))
    tenth = len(times_us) // 10
    middle = times_us[tenth:-tenth]
    capacity_hz = len(middle) / ((middle[-1] - middle[0]) / 1e6)
    return Play(p50_ms, p99_ms, capacity_hz, _num_kafka_threads(process))


def _num_kafka_threads(process: psutil.Process) -> int:
    """librdkafka names its threads ``rdk:main``, ``rdk:broker1`` and so on."""
    names = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/comm")]
    return sum(name.startswith("rdk:") for name in names)


def _table(plays: dict[Placement, list[Play]]) -> str:
    base = plays[PLACEMENTS[0]]
    header = [
        "worker's cores", "model's cores", "`model.num_threads`", "p50 ms", "p99 ms", "backlog/s",
        "p50 ratio", "p99 ratio", "backlog ratio",
    ]  # fmt: skip
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)]]
    for placement, some in plays.items():
        median = Play(*map(statistics.median, zip(*map(astuple, some), strict=True)))

        def ratio(figure: Callable[[Play], float], some: Sequence[Play] = some) -> str:
            pairs = zip(some, base, strict=True)
            return f"{statistics.median(figure(one) / figure(other) for one, other in pairs):.2f}"

        medians = (median.p50_ms, median.p99_ms, median.capacity_hz)
        lines.append(
            [
                _cores(placement.worker, "any"),
                _cores(placement.model, "the worker's"),
                str(placement.num_threads),
                *(f"{figure:.0f}" for figure in medians),
                ratio(lambda play: play.p50_ms),
                ratio(lambda play: play.p99_ms),
                ratio(lambda play: play.capacity_hz),
            ]
        )
    num_threads = statistics.median(one.num_kafka_threads for one in base)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nlibrdkafka's own threads in the worker: {num_threads:g}"


def _cores(numbers: Sequence[int], none: str) -> str:
    return ", ".join(map(str, numbers)) or none


if __name__ == "__main__":
    main()
