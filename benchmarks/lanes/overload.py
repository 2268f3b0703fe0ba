"""All lanes busy: twice what the processor can do, in lanes, in one queue, in strict priority."""

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import psutil

from benchmarks.lanes.load import (
    FIRST_LANE,
    Feature,
    Feed,
    in_turn,
    learned_service_s,
    own_topics,
    play,
    read_back,
    warm_up,
    work_off,
)
from benchmarks.tape import Passage, parts, processor
from benchmarks.virtual import Station, shares, simulate_lanes, steady
from schemas.lanes import LaneSettings
from schemas.settings import Settings
from schemas.timing import STAGES
from tapeline.machine import this_machine
from tapeline.processes import free_ports

ALONE, LANES, FIFO, STRICT = "alone", "lanes", "fifo", "strict"
MODES = (ALONE, LANES, FIFO, STRICT)
_LOAD = 2.0  # times the capacity
_UNCOUNTED_SHARE = 0.2  # of each play, at its beginning
_CALIBRATION_EVENTS = 16_000
_NUM_FITS = 3


@dataclass(frozen=True, slots=True)
class Played:
    """One play of one mode.

    Attributes:
        passages: of the first lane's features, those counted.
        features: of all lanes, those counted, by the append of the feature.
        at_us: when the counted part began and ended.
        cpu: of the processor, in cores.
    """

    mode: str
    passages: list[Passage]
    features: list[Feature]
    at_us: tuple[int, int]
    service_s: Mapping[int, float]
    cpu: float

    @property
    def read_ms(self) -> list[float]:
        return [one.read_ms for one in self.passages]

    @property
    def features_per_s(self) -> float:
        return len(self.features) / ((self.at_us[1] - self.at_us[0]) / 1e6)

    def share(self, lane: str) -> float:
        return sum(one.lane == lane for one in self.features) / max(len(self.features), 1)


@dataclass(frozen=True, slots=True)
class Simulated:
    """The same load in virtual time.

    Attributes:
        mean_batch: records in the micro-batch that a record is in.
        p50_ms, p99_ms: of the first lane, from its arrival to the model's answer.
        unfitted_per_s: features per second if a call took no longer than the model has learned.
    """

    shares: Mapping[str, float]
    features_per_s: float
    mean_batch: float
    p50_ms: float
    p99_ms: float
    unfitted_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Overload:
    """What a run showed.

    Attributes:
        rates_hz: what each lane is offered, in events per second.
        reserved: each lane's reserved share.
        plays: by mode, one a round.
        simulated: the mode ``lanes`` in virtual time.
    """

    machine: str
    capacity_hz: float
    seconds: float
    rates_hz: Mapping[str, float]
    reserved: Mapping[str, float]
    plays: Mapping[str, list[Played]]
    simulated: Simulated | None = None

    def figure(self, mode: str, percentile: float) -> list[float]:
        """A percentile of the first lane's latency to its reading, ms: one a round."""
        return [float(np.percentile(one.read_ms, percentile)) for one in self.plays[mode]]

    def ratio(self, mode: str) -> float:
        """Median of p99 to p99 alone in the same round."""
        pairs = zip(self.figure(mode, 99), self.figure(ALONE, 99), strict=True)
        return statistics.median(one / alone for one, alone in pairs)

    def share(self, mode: str, lane: str) -> float:
        return statistics.median(one.share(lane) for one in self.plays[mode])

    def stage_ms(self, mode: str, stage: str, percentile: float) -> float:
        """Of the first lane, median over the rounds."""
        return statistics.median(
            float(np.percentile([passage.stages_ms[stage] for passage in one.passages], percentile))
            for one in self.plays[mode]
        )

    def expected(self) -> dict[str, float]:
        """Shares that the lanes have a right to while all but the first are backlogged.

        The first has what it asks for; what it leaves of its reserve is the next rank's.
        """
        first, second, *rest = self.reserved
        total = statistics.median(one.features_per_s for one in self.plays[LANES])
        asked = min(self.rates_hz[first] / total, 1.0)
        kept = {lane: self.reserved[lane] for lane in rest}
        return {first: asked, second: 1 - asked - sum(kept.values()), **kept}


def run(options: argparse.Namespace) -> Overload:
    """Calibrates, then plays every mode once a round, in another order each time."""
    machine = str(this_machine())
    overrides = {"metrics": {"port": free_ports(1)[0]}, "worker": {"timing_header": True}}
    with parts(**overrides) as settings:
        capacity_hz = options.capacity or _capacity_hz(settings)
        rates_hz = _rates_hz(settings, capacity_hz, options.realtime_share)
        feeds = [
            Feed(settings, lane, int(rate_hz * options.seconds), rate_hz)
            for lane, rate_hz in rates_hz.items()
        ]
        plays: dict[str, list[Played]] = {mode: [] for mode in MODES}
        for number in range(options.rounds):
            for mode in in_turn(MODES, number, options.rounds):
                plays[mode].append(_play(settings, mode, feeds, options.seconds))
    reserved = {lane.name: lane.reserved_share for lane in settings.active_lanes}
    overload = Overload(machine, capacity_hz, options.seconds, rates_hz, reserved, plays)
    return replace(overload, simulated=_simulated(settings, overload))


def _lanes_of(settings: Settings, mode: str) -> dict[str, LaneSettings]:
    """The lanes of a mode: as they are; the first one for all; or nothing reserved."""
    changes: dict[str, dict[str, object]] = {
        FIFO: {"enabled": False},
        STRICT: {"reserved_share": 0.0},
    }
    lanes = {
        name: lane.model_copy(update=changes.get(mode, {})) for name, lane in settings.lanes.items()
    }
    if mode == FIFO:
        lanes[FIRST_LANE] = settings.lanes[FIRST_LANE].model_copy(update={"reserved_share": 1.0})
    return lanes


def _capacity_hz(settings: Settings) -> float:
    """Features per second while every lane is full; over the middle of a backlog."""
    feeds = [
        Feed(settings, lane.name, int(_CALIBRATION_EVENTS * lane.reserved_share), 1000)
        for lane in settings.active_lanes
    ]
    with own_topics(settings, settings.lanes) as own, processor(own):
        warm_up(own, feeds)
        passages = work_off(own, feeds)
    times_us = sorted(one.feature_us for one in passages)
    fifth = len(times_us) // 5
    middle_us = times_us[fifth:-fifth]
    return len(middle_us) / ((middle_us[-1] - middle_us[0]) / 1e6)


def _rates_hz(settings: Settings, capacity_hz: float, realtime_share: float) -> dict[str, float]:
    """Twice the capacity: the first lane's share of it once, the rest over the others, each in
    proportion to what it has a right to; so all of them are backlogged.
    """
    first, second, *rest = settings.active_lanes
    rights = {second.name: 1 - realtime_share - sum(lane.reserved_share for lane in rest)}
    rights |= {lane.name: lane.reserved_share for lane in rest}
    times = (_LOAD - realtime_share) / sum(rights.values())
    shares_of_load = {first.name: realtime_share} | {
        lane: right * times for lane, right in rights.items()
    }
    return {lane: share * capacity_hz for lane, share in shares_of_load.items()}


def _play(settings: Settings, mode: str, feeds: Sequence[Feed], seconds: float) -> Played:
    first, *others = feeds
    with own_topics(settings, _lanes_of(settings, mode)) as own:
        with processor(own) as process:
            warm_up(own, feeds)
            begun_us, cpu_s = time.time_ns() // 1000, _cpu_s(process)
            passages = play(own, first, [] if mode == ALONE else others, seconds=seconds)
            cpu = (_cpu_s(process) - cpu_s) / (time.time_ns() / 1e9 - begun_us / 1e6)
            service_s = learned_service_s(own)
        features = read_back(own, feeds)
    at_us = begun_us + int(seconds * _UNCOUNTED_SHARE * 1e6), begun_us + int(seconds * 1e6)
    return Played(
        mode,
        [one for one in passages if at_us[0] <= one.event_us < at_us[1]],
        [one for one in features if at_us[0] <= one.feature_us < at_us[1]],
        at_us,
        service_s,
        cpu,
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _simulated(settings: Settings, overload: Overload) -> Simulated:
    """The same load in virtual time, with the measured times of intake and model.

    What a call costs beyond the model's own time is taken from the measured features per second, so
    that the machine is as fast; who gets what of it is the simulation's own.
    """
    plays = overload.plays[LANES]
    buckets = sorted(set.intersection(*(set(one.service_s) for one in plays)))
    station = Station(
        service_s={
            bucket: statistics.median(one.service_s[bucket] for one in plays) for bucket in buckets
        },
        prepare_s=overload.stage_ms(LANES, "batch", 50) / 1000,
        max_batch=settings.worker.max_batch,
        max_in_flight=settings.worker.max_in_flight,
        max_service_share=settings.worker.max_service_share,
    )
    measured_hz = statistics.median(one.features_per_s for one in plays)
    first = simulated = _simulate(settings, overload, station)
    for _ in range(_NUM_FITS):
        excess_s = 1 / measured_hz - 1 / simulated.features_per_s  # of a record
        between_s = max(station.between_s + excess_s * simulated.mean_batch, 0.0)
        station = replace(station, between_s=between_s)
        simulated = _simulate(settings, overload, station)
    return replace(simulated, unfitted_per_s=first.features_per_s)


def _simulate(settings: Settings, overload: Overload, station: Station) -> Simulated:
    seconds, lanes = overload.seconds, settings.active_lanes
    arrivals_s = {lane: steady(rate_hz, seconds) for lane, rate_hz in overload.rates_hz.items()}
    ways = simulate_lanes(lanes, arrivals_s, station, until_s=seconds)
    begin_s = seconds * _UNCOUNTED_SHARE
    counted = [one for one in ways if begin_s <= one.done_s < seconds]
    latencies_ms = [1000 * one.latency_s for one in counted if one.lane == lanes[0].name]
    p50_ms, p99_ms = np.percentile(latencies_ms, [50, 99]).tolist()
    return Simulated(
        shares(counted, lanes),
        len(counted) / (seconds - begin_s),
        statistics.fmean(one.num_aboard for one in counted),
        p50_ms,
        p99_ms,
    )


def report(overload: Overload) -> dict[str, object]:
    """The figures, for JSON."""
    lanes = list(overload.rates_hz)
    return {
        "machine": overload.machine,
        "capacity_hz": overload.capacity_hz,
        "seconds": overload.seconds,
        "rates_hz": dict(overload.rates_hz),
        "reserved": dict(overload.reserved),
        "expected": overload.expected(),
        "simulated": asdict(overload.simulated) if overload.simulated else None,
        "modes": {
            mode: {
                "p50_ms": overload.figure(mode, 50),
                "p99_ms": overload.figure(mode, 99),
                "p99_ratio": overload.ratio(mode),
                "features_per_s": [one.features_per_s for one in overload.plays[mode]],
                "processor_cores": [one.cpu for one in overload.plays[mode]],
                "shares": {lane: overload.share(mode, lane) for lane in lanes},
                "service_s": [dict(one.service_s) for one in overload.plays[mode]],
                "stages_ms": {
                    stage: [overload.stage_ms(mode, stage, which) for which in (50, 99)]
                    for stage in STAGES[:-1]
                },
            }
            for mode in overload.plays
        },
    }


def table(overload: Overload) -> str:
    """The figures, for people: latencies, where they come from, shares."""
    offered = ", ".join(f"{lane} {rate_hz:.0f}" for lane, rate_hz in overload.rates_hz.items())
    lines = [
        f"{overload.machine}; {len(overload.plays[LANES])} rounds of {overload.seconds:g} s",
        f"capacity {overload.capacity_hz:.0f} features/s",
        f"offered {sum(overload.rates_hz.values()):.0f} events/s: {offered}",
    ]
    parts_of_it = [_latency_table, _stage_table, _share_table, _simulated_lines]
    return "\n\n".join(["\n".join(lines), *("\n".join(part(overload)) for part in parts_of_it)])


def _latency_table(overload: Overload) -> list[str]:
    lines = [
        "| realtime | p50 ms | p99 ms | least to most | p99 to alone | features/s in all |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for mode in MODES:
        p99s = overload.figure(mode, 99)
        rate_hz = statistics.median(one.features_per_s for one in overload.plays[mode])
        lines.append(
            f"| {mode} | {statistics.median(overload.figure(mode, 50)):.0f} "
            f"| {statistics.median(p99s):.0f} | {min(p99s):.0f} to {max(p99s):.0f} "
            f"| {overload.ratio(mode):.2f} | {rate_hz:.0f} |"
        )
    return lines


def _stage_table(overload: Overload) -> list[str]:
    stages = STAGES[:-1]
    lines = [
        f"| realtime, p50 / p99 ms | {' | '.join(stages)} |",
        f"| --- |{' ---: |' * len(stages)}",
    ]
    for mode in MODES:
        cells = [
            f"{overload.stage_ms(mode, stage, 50):.1f} / {overload.stage_ms(mode, stage, 99):.1f}"
            for stage in stages
        ]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    return lines


def _share_table(overload: Overload) -> list[str]:
    assert overload.simulated
    lines = [
        "| share of features | reserved | due | lanes | simulated | off by | fifo | strict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for lane, due in overload.expected().items():
        measured, simulated = overload.share(LANES, lane), overload.simulated.shares[lane]
        lines.append(
            f"| {lane} | {overload.reserved[lane]:.0%} | {due:.1%} | {measured:.1%} "
            f"| {simulated:.1%} | {simulated / measured - 1 if measured else 0:+.1%} "
            f"| {overload.share(FIFO, lane):.1%} | {overload.share(STRICT, lane):.1%} |"
        )
    return lines


def _simulated_lines(overload: Overload) -> list[str]:
    assert overload.simulated
    simulated = overload.simulated
    measured_ms = sum(overload.stage_ms(LANES, stage, 50) for stage in ("queue", "batch", "model"))
    return [
        f"in virtual time: {simulated.features_per_s:.0f} features/s "
        f"({simulated.unfitted_per_s:.0f} before the fit), {simulated.mean_batch:.1f} records a "
        "micro-batch",
        f"realtime in virtual time, to the model's answer: p50 {simulated.p50_ms:.0f}, p99 "
        f"{simulated.p99_ms:.0f} ms; measured p50 of queue, batch and model: {measured_ms:.0f} ms",
    ]
