"""A backfill that runs again: what the feature cache saves.

    python -m benchmarks.cache FILE [FILE ...] [--events 20000] [--rounds 3] [--json]

Starts a broker and a Redis of its own. A round appends the files' first events to the historical
lane three times, each time to new topics with a new ``tapeline worker`` on the default CPU model:
without the cache, with an empty one, and again with what that one kept. Features per second are
from the first feature's append to the last one's, on the broker's clock. Medians over the rounds.
"""

import argparse
import json
import statistics
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

from benchmarks.lanes.load import own_topics
from benchmarks.tape import parts, processor, worker_metrics
from schemas.messages import MarketEvent
from schemas.settings import Settings
from tapeline.machine import this_machine
from tapeline.processes import free_ports
from tapeline.producer import MarketEventProducer
from tapeline.sources import open_source
from tapeline.subscriber import FeatureRecord, FeatureSubscriber

_LANE = "historical"
_MODES = ("without", "first", "again")
_IDLE_S = 20.0  # after which nothing more is expected
_MILLION = 1e6


@dataclass(frozen=True, slots=True)
class Backfill:
    """One run of the events, or medians of several.

    Attributes:
        hit_rate: of the windows that the cache was asked for; 0 without it.
        faults: stale, rejected, error or mismatch, all together.
    """

    seconds: float
    features_per_s: float
    num_features: float
    hit_rate: float
    faults: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="tapes that `tapeline produce` reads")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options = parser.parse_args()

    machine = str(this_machine())
    with open_source(options.files) as source:
        events = list(islice(source, options.events))
    with parts(metrics={"port": free_ports(1)[0]}) as settings:
        rounds = [_round(settings, events) for _ in range(options.rounds)]
    medians = {
        mode: Backfill(
            *(
                statistics.median(values)
                for values in zip(*(asdict(one[mode]).values() for one in rounds), strict=True)
            )
        )
        for mode in _MODES
    }
    if options.json:
        modes = {mode: asdict(one) for mode, one in medians.items()}
        print(json.dumps({"machine": machine, "events": len(events), "modes": modes}, indent=2))
        return
    print(f"{machine}; {len(events):,} events, {options.rounds} rounds\n")
    print("| cache | seconds | features/s | features | hits | faults | time to `without` |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for mode, one in medians.items():
        ratio = statistics.median(each[mode].seconds / each["without"].seconds for each in rounds)
        print(
            f"| {mode} | {one.seconds:.1f} | {one.features_per_s:,.0f} | {one.num_features:,.0f} "
            f"| {one.hit_rate:.1%} | {one.faults:.0f} | {ratio:.2f} |"
        )


def _round(settings: Settings, events: Sequence[MarketEvent]) -> dict[str, Backfill]:
    """All modes; raises SystemExit unless they give the same features, bit for bit."""
    prefix = f"{settings.cache.key_prefix}{uuid.uuid4().hex}:"
    cache = settings.cache.model_copy(update={"key_prefix": prefix})
    found: dict[str, Backfill] = {}
    bits: dict[str, dict[str, bytes]] = {}
    for mode in _MODES:
        lane = settings.lane(_LANE).model_copy(update={"cache": mode != "without"})
        mine = settings.model_copy(update={"cache": cache, "lanes": settings.lanes | {_LANE: lane}})
        found[mode], records = _run(mine, events)
        bits[mode] = {one.feature.event_id: one.feature.features.tobytes() for one in records}
    if not bits["without"] == bits["first"] == bits["again"]:
        raise SystemExit("the features differ between the runs")
    return found


def _run(settings: Settings, events: Sequence[MarketEvent]) -> tuple[Backfill, list[FeatureRecord]]:
    with own_topics(settings, settings.lanes) as own:
        with MarketEventProducer(own) as producer:
            for event in events:
                producer.produce(event, lane=_LANE)
        with processor(own):
            with FeatureSubscriber(
                own, lanes=[_LANE], start="earliest", idle_timeout_s=_IDLE_S
            ) as subscriber:
                records = list(subscriber.records())
            hits, misses, faults = _counts(own)
    seconds = (max(one.appended_us for one in records) - records[0].appended_us) / _MILLION
    asked = hits + misses
    hit_rate = hits / asked if asked else 0.0
    backfill = Backfill(seconds, len(records) / seconds, len(records), hit_rate, faults)
    return backfill, records


def _counts(settings: Settings) -> tuple[float, float, float]:
    """Hits, misses and faults of the worker's cache, as its metrics say."""
    names = (
        "cnn_lstm_cache_hits_total",
        "cnn_lstm_cache_misses_total",
        "tapeline_cache_faults_total",
    )
    totals = dict.fromkeys(names, 0.0)
    for name, _, value in worker_metrics(settings):
        if name in totals:
            totals[name] += value
    hits, misses, faults = totals.values()
    return hits, misses, faults


if __name__ == "__main__":
    main()
