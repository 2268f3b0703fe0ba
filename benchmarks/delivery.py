"""What exactly once costs against at least once, and what commit intervals cost.

    python -m benchmarks.delivery [--rates 100,500] [--seconds 10] [--rounds 3] [--json]

Starts a broker and a Redis of its own and, one after the other, a ``tapeline worker`` for each mode
with the default CPU model; each round has all modes, in another order. Events of a simulated market
arrive at a set rate (open loop). Two latencies:

- to the append of the feature: both on the broker's clock (LogAppendTime, in ms);
- to its reading by a subscriber on this machine: with ``exactly_once`` a feature can be read only
  when its transaction has ended.

Medians over the rounds. The ratio is to the first mode named, at the same rate in the same round.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from benchmarks.tape import Passage, Tape, parts, processor
from schemas.settings import Settings
from tapeline.machine import this_machine

AT_LEAST_ONCE, EXACTLY_ONCE = "at_least_once", "exactly_once"
_UNCOUNTED_SHARE = 0.2  # of each play, at its beginning


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to deliver; the interval is between commits, or between a lane's transactions."""

    delivery: str
    interval_ms: float

    def settings(self, settings: Settings) -> Settings:
        interval = {
            AT_LEAST_ONCE: "commit_interval_ms",
            EXACTLY_ONCE: "transaction_interval_ms",
        }[self.delivery]
        update = {"delivery": self.delivery, interval: self.interval_ms}
        worker = settings.worker.model_copy(update=update)
        return settings.model_copy(update={"worker": worker})


@dataclass(frozen=True, slots=True)
class Cost:
    """Latencies from an event's append, milliseconds: of one play, or medians of several."""

    append_p50_ms: float
    append_p99_ms: float
    read_p50_ms: float
    read_p95_ms: float
    read_p99_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """A mode at a rate: medians over the rounds.

    Attributes:
        read_p99_range_ms: least and most over the rounds: how far the median is to be trusted.
        p50_ratio, p99_ratio: of the readings, to the first mode's.
    """

    delivery: str
    interval_ms: float
    rate_hz: float
    cost: Cost
    read_p99_range_ms: tuple[float, float]
    p50_ratio: float
    p99_ratio: float


Plays = dict[tuple[Mode, float], list[Cost]]


def main() -> None:
    """Runs what the command line asks for; prints a table, and JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="benchmarks.delivery", description=__doc__)
    parser.add_argument("--rates", type=_numbers, default="100,500", help="events per second")
    parser.add_argument("--commit-intervals", type=_numbers, default="200,50", help="ms")
    parser.add_argument("--transaction-intervals", type=_numbers, default="0,10,20,50,100")
    parser.add_argument("--seconds", type=float, default=10, help="of each rate in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    modes = [Mode(AT_LEAST_ONCE, interval) for interval in options.commit_intervals]
    modes += [Mode(EXACTLY_ONCE, interval) for interval in options.transaction_intervals]
    if not modes:
        parser.error("there is nothing to measure; give at least one interval")

    machine = str(this_machine())
    with parts() as settings:
        plays = _play(settings, modes, options.rates, options.seconds, options.rounds)
    rows = [_row(plays, modes[0], mode, rate) for rate in options.rates for mode in modes]
    if options.json:
        report = {
            "machine": machine,
            "seconds": options.seconds,
            "rounds": options.rounds,
            "rows": [asdict(row) for row in rows],
        }
        print(json.dumps(report, indent=2))
    else:
        print(f"{machine}; {options.rounds} rounds of {options.seconds:g} s\n")
        print(_table(rows))


def _numbers(text: str) -> list[float]:
    return [float(number) for number in text.split(",") if number]


def _play(
    settings: Settings,
    modes: Sequence[Mode],
    rates_hz: Sequence[float],
    seconds: float,
    rounds: int,
) -> Plays:
    """Every mode at every rate, once a round, with a worker of its own each time."""
    tape = Tape(settings)
    plays: Plays = defaultdict(list)
    for number in range(rounds):
        turn = number * len(modes) // rounds
        for mode in [*modes[turn:], *modes[:turn]]:
            with processor(mode.settings(settings)):
                tape.warm_up()
                for rate_hz in rates_hz:
                    plays[mode, rate_hz].append(_cost(tape.play(int(rate_hz * seconds), rate_hz)))
    return plays


def _cost(passages: Sequence[Passage]) -> Cost:
    counted = passages[int(len(passages) * _UNCOUNTED_SHARE) :]
    appended = [(one.feature_us - one.event_us) / 1000 for one in counted]
    read = [(one.read_us - one.event_us) / 1000 for one in counted]
    percentiles = [*np.percentile(appended, [50, 99]), *np.percentile(read, [50, 95, 99])]
    return Cost(*map(float, percentiles))


def _row(plays: Plays, base: Mode, mode: Mode, rate_hz: float) -> Row:
    costs, base_costs = plays[mode, rate_hz], plays[base, rate_hz]
    columns = zip(*(asdict(one).values() for one in costs), strict=True)
    p99s = [one.read_p99_ms for one in costs]

    def ratio(figure: Callable[[Cost], float]) -> float:
        pairs = zip(costs, base_costs, strict=True)
        return statistics.median(figure(one) / figure(other) for one, other in pairs)

    return Row(
        mode.delivery,
        mode.interval_ms,
        rate_hz,
        Cost(*(statistics.median(column) for column in columns)),
        (min(p99s), max(p99s)),
        ratio(lambda cost: cost.read_p50_ms),
        ratio(lambda cost: cost.read_p99_ms),
    )


def _table(rows: Sequence[Row]) -> str:
    header = [
        "events/s", "delivery", "interval ms", "append p50", "append p99",
        "read p50", "read p95", "read p99", "p99 least to most", "p50 ratio", "p99 ratio",
    ]  # fmt: skip
    lines = [header, ["---:", "---", *["---:"] * (len(header) - 2)]]
    for row in rows:
        low, high = row.read_p99_range_ms
        figures = [f"{figure:.0f}" for figure in asdict(row.cost).values()]
        ratios = [f"{row.p50_ratio:.2f}", f"{row.p99_ratio:.2f}"]
        mode = [f"{row.rate_hz:g}", f"`{row.delivery}`", f"{row.interval_ms:g}"]
        lines.append([*mode, *figures, f"{low:.0f} to {high:.0f}", *ratios])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
