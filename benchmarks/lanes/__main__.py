"""The lanes measured, on a real Kafka and a real Redis, with the default model on a CPU.

    python -m benchmarks.lanes overload [--plot FILE.png] [--rounds 3] [--seconds 20] [--json]
    python -m benchmarks.lanes low-load [--rate 20] [--rounds 3] [--seconds 20] [--json]
    python -m benchmarks.lanes burst [--events 100000] [--rounds 3] [--json]

Each starts a broker and a Redis of its own. Latency is from an event's append, on the broker's
clock, to the reading of its feature by a subscriber on this machine, open loop. Everything shares
the machine: broker, Redis, worker, model, load and subscriber. Medians over interleaved rounds.
"""

import argparse
import json
from pathlib import Path

from benchmarks.lanes import burst, low_load, overload


def main() -> None:
    """Runs what the command line asks for; prints tables, or JSON with ``--json``."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.lanes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_overload(commands.add_parser("overload", help="twice the capacity, on all lanes"))
    _add_low_load(commands.add_parser("low-load", help="one event at a time"))
    _add_burst(commands.add_parser("burst", help="100,000 historical events beside realtime"))
    options = parser.parse_args()
    options.run(options)


def _add_overload(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, seconds=20)
    parser.add_argument("--realtime-share", type=float, default=0.25, help="of the capacity")
    parser.add_argument("--capacity", type=float, help="features/s; by default it is measured")
    parser.add_argument("--plot", type=Path, help="a PNG of latencies and shares")
    parser.set_defaults(run=_overload)


def _overload(options: argparse.Namespace) -> None:
    found = overload.run(options)
    print(json.dumps(overload.report(found), indent=2) if options.json else overload.table(found))
    if options.plot:
        from benchmarks.lanes.plot import save_plot  # matplotlib, only here

        save_plot(found, options.plot)


def _add_low_load(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, seconds=20)
    parser.add_argument("--rate", type=float, default=20, help="events per second")
    parser.set_defaults(run=_low_load)


def _low_load(options: argparse.Namespace) -> None:
    found = low_load.run(options)
    print(json.dumps(low_load.report(found), indent=2) if options.json else low_load.table(found))


def _add_burst(parser: argparse.ArgumentParser) -> None:
    _add_common(parser, seconds=20)
    parser.add_argument("--rate", type=float, default=125, help="realtime events per second")
    parser.add_argument("--events", type=int, default=100_000, help="of the burst")
    parser.add_argument(
        "--append-rate",
        type=float,
        default=0,
        help="of the burst, events per second; 0: as fast as the broker takes them",
    )
    parser.set_defaults(run=_burst)


def _burst(options: argparse.Namespace) -> None:
    found = burst.run(options)
    print(json.dumps(burst.report(found), indent=2) if options.json else burst.table(found))


def _add_common(parser: argparse.ArgumentParser, seconds: float) -> None:
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=seconds, help="of each play")
    parser.add_argument("--json", action="store_true")


if __name__ == "__main__":
    main()
