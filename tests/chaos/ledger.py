"""What was acknowledged on the way in against what came out: the drills' own ledger.

It knows the load's intent, so it also sees an acknowledged record that the broker lost, which no
reader of topics can. ``tapeline.audit`` judges beside it, from the topics alone.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from confluent_kafka import Consumer, Message, TopicPartition
from waiting import wait_until

from chaos.load import Intent
from schemas.codec import Codec
from schemas.errors import ConfigError, TapelineError, TransientError
from schemas.kafka import client_config
from schemas.messages import Flags
from schemas.settings import Settings
from tapeline.audit import audit
from tapeline.clients import list_offsets, make_admin
from tapeline.lag import lane_lags

_SETTLE_TIMEOUT_S = 90.0
_READ_TIMEOUT_S = 120.0
_MAX_SHOWN = 5


@dataclass(slots=True)
class Verdict:
    """What the ledger says.

    Attributes:
        problems: one sentence for each promise that was broken; none when it is clean.
        repeats: ids of events whose feature was published more than once, from one and the same
            record and with the same bits: at_least_once's cost.
        num_repeated: features beyond the first of an event.
        judges: who judged.
    """

    problems: list[str] = field(default_factory=list)
    repeats: list[str] = field(default_factory=list)
    num_features: int = 0
    num_repeated: int = 0
    num_letters: int = 0
    judges: str = "own ledger"

    @property
    def is_clean(self) -> bool:
        return not self.problems

    def note(self, what: str, which: set[str] | list[str]) -> None:
        if which:
            shown = ", ".join(sorted(which)[:_MAX_SHOWN])
            self.problems.append(f"{len(which)} {what}: {shown}")


def wait_until_settled(settings: Settings, *, tend: Callable[[], None]) -> None:
    """Returns when every record of every lane is committed; meanwhile calls ``tend`` often."""
    left: dict[str, int] | str = {}

    def settled() -> bool:
        nonlocal left
        tend()
        left = _behind(settings)
        return not left

    try:
        wait_until(settled, _SETTLE_TIMEOUT_S, "every record to be committed")
    except TimeoutError as error:
        raise TimeoutError(f"{error}; behind: {left}") from error


def _behind(settings: Settings) -> dict[str, int] | str:
    """Records behind by partition, or why nobody can tell."""
    try:
        lags = lane_lags(settings)
    except (TransientError, ConfigError) as error:
        return str(error)
    return {f"{one.topic}:{one.partition}": one.lag for one in lags if one.lag}


def judge(settings: Settings, intent: Intent) -> Verdict:
    """Reads every output as a read_committed reader does and holds it against the intent."""
    verdict = Verdict()
    _judge_features(settings, intent, verdict)
    _judge_letters(settings, intent, verdict)
    try:
        report = audit(settings, settled=True)
    except NotImplementedError:
        return verdict
    except TapelineError as error:
        verdict.problems.append(f"the audit could not be made: {error}")
        return verdict
    verdict.judges = "own ledger and audit"
    if not report.is_clean:
        verdict.problems.append(f"audit: {report.first_violation}")
    if verdict.is_clean and set(report.duplicates) != set(verdict.repeats):
        verdict.problems.append(
            f"audit counts {len(report.duplicates)} repeated events, we {len(verdict.repeats)}"
        )
    return verdict


def _judge_features(settings: Settings, intent: Intent, verdict: Verdict) -> None:
    codec = Codec(settings.schema_registry)
    sources: defaultdict[str, set[str]] = defaultdict(set)
    bits: defaultdict[str, set[tuple[bytes, Flags]]] = defaultdict(set)
    newest: dict[tuple[str, str], int] = {}
    late, repeats = [], set()
    topics = sorted({lane.output_topic for lane in settings.active_lanes})
    for message in read_all(settings, topics):
        feature = codec.decode_feature(message.value(), message.headers() or ())
        event_id, symbol = feature.event_id, (feature.lane, feature.symbol)
        source = f"{feature.source_topic}:{feature.source_partition}:{feature.source_offset}"
        verdict.num_features += 1
        if source in sources[event_id]:
            repeats.add(event_id)
        elif feature.source_offset < newest.get(symbol, -1):
            late.append(source)
        else:
            newest[symbol] = feature.source_offset
        sources[event_id].add(source)
        bits[event_id].add((feature.features.tobytes(), feature.flags & ~Flags.STALE))
    published = set(sources)
    verdict.repeats = sorted(repeats)
    verdict.num_repeated = verdict.num_features - len(published)
    verdict.note("events lost", intent.expected - published)
    verdict.note("features of events that filled windows", published & intent.warm_up)
    verdict.note("features of unknown events", published - intent.expected - intent.warm_up)
    doubled = {event_id for event_id, places in sources.items() if len(places) > 1}
    verdict.note("duplicates with features of their own", doubled)
    verdict.note("features out of order", late)
    unlike = {event_id for event_id, values in bits.items() if len(values) > 1}
    verdict.note("features repeated with other bits", unlike - doubled)
    if settings.worker.delivery == "exactly_once":
        verdict.note("events published twice", repeats)


def _judge_letters(settings: Settings, intent: Intent, verdict: Verdict) -> None:
    topics = [lane.dlq_topic for lane in settings.active_lanes]
    sources = [
        dict(message.headers() or ())["dlq-source"].decode()
        for message in read_all(settings, topics)
    ]
    verdict.num_letters = len(sources)
    verdict.note("poison records lost", intent.poison - set(sources))
    verdict.note("dead letters of good records", set(sources) - intent.poison)
    if settings.worker.delivery == "exactly_once" and len(set(sources)) < len(sources):
        verdict.problems.append(f"{len(sources) - len(set(sources))} dead letters came twice")


def read_all(settings: Settings, topics: list[str]) -> Iterator[Message]:
    """Every committed record of the topics, up to where they end now; in order per partition."""
    admin = make_admin(settings)
    metadata = admin.list_topics(timeout=settings.kafka.timeout_s).topics
    partitions = [TopicPartition(name, number) for name in topics
                  for number in metadata[name].partitions]  # fmt: skip
    ends = list_offsets(admin, settings, partitions, latest=True)
    consumer = Consumer(
        client_config(
            settings,
            required={
                "group.id": "chaos-ledger",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
            },
        )
    )
    wanted = {where: end for where, end in ends.items() if end > 0}
    consumer.assign([TopicPartition(*where, 0) for where in wanted])
    deadline_s = time.monotonic() + _READ_TIMEOUT_S
    try:
        while True:
            for message in consumer.consume(1_000, 0.2):
                assert message.error() is None, message.error()
                yield message
            positions = consumer.position([TopicPartition(*where) for where in wanted])
            if all(one.offset >= wanted[one.topic, one.partition] for one in positions):
                return
            assert time.monotonic() < deadline_s, f"{topics} could not be read to their ends"
    finally:
        consumer.close()
