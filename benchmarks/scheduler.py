"""What a decision of the lane scheduler costs: microseconds of CPU per record.

    python -m benchmarks.scheduler [--records 1000000] [--rounds 3] [--json]

All five default lanes are saturated. Timed is what a worker does with them: ``put`` of what a
poller brings, ``take`` of each micro-batch, and ``observe`` of its call to the model, by this
process's CPU clock. A row for each size of micro-batch, because a decision is made per micro-batch;
medians over the rounds.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from consumers.records import Record
from consumers.scheduler import LaneScheduler
from consumers.service_times import ServiceTimes
from schemas.settings import load_settings
from tapeline.machine import this_machine

_POLLED = 500  # records that a poller brings at once
_NUM_WAITING = 4_096  # of each lane, at most
_NOW_US = 1_700_000_000_000_000
_SERVICE_S = 0.005  # of any micro-batch, so that only ``max_batch`` limits them
_SIZES = (4, 8, 32, 256)


@dataclass(frozen=True, slots=True)
class Row:
    """A size of micro-batch: what its records cost, and that every lane had its share."""

    max_batch: int
    num_records: int
    cpu_s: float
    us_per_record: float
    us_per_batch: float
    shares: dict[str, float]


def main() -> None:
    """Runs what the command line asks for; prints a table, and JSON with ``--json``."""
    parser = argparse.ArgumentParser(prog="benchmarks.scheduler", description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    machine = str(this_machine())
    rounds = [[_row(size, options.records) for size in _SIZES] for _ in range(options.rounds)]
    rows = [_median(one) for one in zip(*rounds, strict=True)]
    if options.json:
        print(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(f"{machine}; {options.records:,} records, {options.rounds} rounds\n")
        print(_table(rows))


def _row(max_batch: int, num_records: int) -> Row:
    """Works off at least so many records of saturated lanes."""
    settings = load_settings()
    lanes = settings.active_lanes
    service_times = ServiceTimes()
    service_times.expect(dict.fromkeys((4, 8, 16, 32, 64, 128, 256), _SERVICE_S))
    scheduler = LaneScheduler(
        lanes,
        service_times,
        max_batch=max_batch,
        max_service_share=settings.worker.max_service_share,
    )
    polled = {
        lane.name: [
            Record(lane.name, (lane.topic, offset % 4), offset, None, b"", (), _NOW_US)
            for offset in range(_POLLED)
        ]
        for lane in lanes
    }
    taken, now_s = 0, 0.0
    begun_s = time.process_time()
    while taken < num_records:
        for lane, records in polled.items():
            while scheduler.num_queued(lane) + _POLLED <= _NUM_WAITING:
                scheduler.put(lane, records)
        # A refill lasts until the lane with the largest share has used up what was brought.
        for _ in range(max(1, _NUM_WAITING // 2 // max_batch)):
            batch = scheduler.take(_NOW_US)
            service_times.observe(len(batch), now_s, now_s + _SERVICE_S)
            now_s += _SERVICE_S
            taken += len(batch)
    cpu_s = time.process_time() - begun_s
    num_batches = -(-taken // max_batch)
    return Row(
        max_batch,
        taken,
        cpu_s,
        cpu_s / taken * 1e6,
        cpu_s / num_batches * 1e6,
        {lane: num / taken for lane, num in scheduler.num_taken().items()},
    )


def _median(rows: Sequence[Row]) -> Row:
    """The round in the middle, by its cost."""
    middle = statistics.median_low(row.us_per_record for row in rows)
    return next(row for row in rows if row.us_per_record == middle)


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "| records a micro-batch | us per record | us per micro-batch | s for 1,000,000 | shares |",
        "| ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        shares = ", ".join(f"{lane} {share:.1%}" for lane, share in row.shares.items())
        lines.append(
            f"| {row.max_batch} | {row.us_per_record:.2f} | {row.us_per_batch:.0f} "
            f"| {row.us_per_record:.1f} | {shares} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
