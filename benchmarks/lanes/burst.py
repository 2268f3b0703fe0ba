"""A hundred thousand historical events at once beside a steady realtime lane."""

import argparse
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.lanes.load import (
    FIRST_LANE,
    Feed,
    Sender,
    learned_service_s,
    own_topics,
    play,
    read_back,
    warm_up,
)
from benchmarks.tape import Passage, parts, processor
from consumers.records import Record
from consumers.scheduler import LaneScheduler
from consumers.service_times import ServiceTimes
from schemas.settings import Settings
from tapeline.machine import this_machine
from tapeline.processes import free_ports

_BURST_LANE = "historical"
_BURST_RATE_HZ = 1_000.0  # on its tape: its event times
_UNCOUNTED_SHARE = 0.2  # of the calm


@dataclass(frozen=True, slots=True)
class Burst:
    """One round.

    Attributes:
        calm, appending, working: latencies of realtime, ms: before the burst, while it was
            appended, while it was worked off.
        appended_s: how long appending took.
        num_done: features of the burst by the end.
        batch_s: what the scheduler takes for the time of its largest micro-batch while realtime is
            awake, from the service times it has learned.
    """

    calm: list[float]
    appending: list[float]
    working: list[float]
    appended_s: float
    num_done: int
    service_s: Mapping[int, float]
    batch_s: float

    def moved_ms(self) -> float:
        """By how much p99 is higher while the burst is appended and worked off."""
        during = [*self.appending, *self.working]
        return float(np.percentile(during, 99) - np.percentile(self.calm, 99))


@dataclass(frozen=True, slots=True)
class Bursts:
    """What a run showed."""

    machine: str
    rate_hz: float
    num_events: int
    rounds: Sequence[Burst]


def run(options: argparse.Namespace) -> Bursts:
    """One burst a round, each with a worker and topics of its own."""
    machine = str(this_machine())
    overrides = {"metrics": {"port": free_ports(1)[0]}, "worker": {"timing_header": True}}
    with parts(**overrides) as settings:
        num_steady = int(options.rate * 2 * options.seconds)
        steady = Feed(settings, FIRST_LANE, num_steady, options.rate)
        burst = Feed(settings, _BURST_LANE, options.events, _BURST_RATE_HZ)
        append_s = options.events / options.append_rate if options.append_rate else 0.0
        rounds = [
            _play(settings, steady, burst, options.seconds, append_s) for _ in range(options.rounds)
        ]
    return Bursts(machine, options.rate, options.events, rounds)


def _play(settings: Settings, steady: Feed, burst: Feed, seconds: float, append_s: float) -> Burst:
    """Calm for ``seconds``, then the burst and as long again; at once if ``append_s`` is 0."""
    with own_topics(settings, settings.lanes) as own:
        with processor(own):
            warm_up(own, [steady, burst])
            begun_us = _now_us()
            appended_us: list[int] = []

            def append() -> None:
                threading.Event().wait(seconds)
                appended_us.append(_now_us())
                with Sender(own, linger_ms=20) as sender:
                    if append_s:
                        sender.send_steadily({burst.lane: burst.play}, time.monotonic(), append_s)
                    else:
                        sender.send(burst.lane, burst.play)
                appended_us.append(_now_us())

            thread = threading.Thread(target=append)
            thread.start()
            passages = play(own, steady, seconds=2 * seconds)
            thread.join()
            service_s = learned_service_s(own)
        features = read_back(own, [steady, burst])
    num_done = sum(one.lane == burst.lane for one in features) - burst.num_warm_up_features
    burst_us, done_us = appended_us
    if num_done >= len(burst.play):
        raise SystemExit("the burst was over before the play; give it more --events")
    counted_us = begun_us + int(seconds * _UNCOUNTED_SHARE * 1e6)
    return Burst(
        _read_ms(passages, counted_us, burst_us),
        _read_ms(passages, burst_us, done_us),
        _read_ms(passages, done_us, passages[-1].event_us + 1),
        (done_us - burst_us) / 1e6,
        num_done,
        service_s,
        _batch_s(settings, service_s),
    )


def _now_us() -> int:
    return time.time_ns() // 1000


def _read_ms(passages: Sequence[Passage], from_us: int, until_us: int) -> list[float]:
    return [one.read_ms for one in passages if from_us <= one.event_us < until_us]


def _batch_s(settings: Settings, service_s: Mapping[int, float]) -> float:
    """The time of the largest micro-batch that the scheduler makes while realtime is awake."""
    service_times = ServiceTimes()
    service_times.expect(service_s)
    scheduler = LaneScheduler(
        settings.active_lanes,
        service_times,
        max_batch=settings.worker.max_batch,
        max_service_share=settings.worker.max_service_share,
    )
    now_us = _now_us()
    record = Record(FIRST_LANE, ("", 0), 0, None, None, (), now_us)
    scheduler.put(FIRST_LANE, [record])
    return service_times.predict(scheduler.limit(now_us))


def report(found: Bursts) -> dict[str, object]:
    """The figures, for JSON."""
    return {
        "machine": found.machine,
        "rate_hz": found.rate_hz,
        "num_events": found.num_events,
        "rounds": [
            {
                **{
                    f"{name}_p{which}_ms": float(np.percentile(read_ms, which))
                    for name, read_ms in _parts_of(one).items()
                    for which in (50, 99)
                },
                "moved_ms": one.moved_ms(),
                "batch_ms": 1000 * one.batch_s,
                "appended_s": one.appended_s,
                "num_done": one.num_done,
                "service_s": dict(one.service_s),
            }
            for one in found.rounds
        ],
    }


def _parts_of(burst: Burst) -> dict[str, list[float]]:
    return {"calm": burst.calm, "appending": burst.appending, "working": burst.working}


def table(found: Bursts) -> str:
    """The figures, for people."""
    lines = [
        f"{found.machine}; {len(found.rounds)} bursts of {found.num_events:,} events beside "
        f"{found.rate_hz:g} realtime events/s",
        "",
        "| realtime | p50 ms | p99 ms | p99 least to most |",
        "| --- | ---: | ---: | ---: |",
    ]
    names = {
        "calm": "before the burst",
        "appending": "while it is appended",
        "working": "while it is worked off",
    }
    for part, name in names.items():
        p50s, p99s = (
            [float(np.percentile(_parts_of(one)[part], which)) for one in found.rounds]
            for which in (50, 99)
        )
        lines.append(
            f"| {name} | {statistics.median(p50s):.0f} | {statistics.median(p99s):.0f} "
            f"| {min(p99s):.0f} to {max(p99s):.0f} |"
        )
    moved_ms = [one.moved_ms() for one in found.rounds]
    lines += [
        "",
        f"p99 moved by {statistics.median(moved_ms):.1f} ms "
        f"({min(moved_ms):.1f} to {max(moved_ms):.1f}); a micro-batch takes "
        f"{1000 * statistics.median(one.batch_s for one in found.rounds):.1f} ms",
        f"appending took {statistics.median(one.appended_s for one in found.rounds):.1f} s; "
        f"{statistics.median(one.num_done for one in found.rounds):,.0f} events of the burst were "
        "done by the end",
    ]
    return "\n".join(lines)
