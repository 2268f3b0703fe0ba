"""What the lane benchmarks share: an encoded load, topics of a play's own, and what came of it."""

import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple

from confluent_kafka import Producer

from benchmarks.tape import NUM_SYMBOLS, WARM_UP_EVENTS, Passage, Reader, worker_metrics
from schemas.codec import Codec
from schemas.kafka import IDEMPOTENT, client_config, make_client
from schemas.lanes import LaneSettings
from schemas.settings import Settings
from tapeline.simulator import simulate
from tapeline.subscriber import FeatureSubscriber
from tapeline.topics import admin_client, ensure_topics, lane_topics

FIRST_LANE = "realtime"
_IDLE_S = 120.0
_START_S = 300.0  # of Ray, on a busy machine
_READ_BACK_IDLE_S = 3.0
_WARM_UP_PER_SYMBOL = 150  # on average: the least active one gets its 59 too
_TICK_S = 0.02
_START_TIME_US = 1_700_000_000_000_000


class Encoded(NamedTuple):
    """An event as it is sent.

    Attributes:
        at_s: on the tape, since its beginning.
    """

    at_s: float
    key: bytes
    value: bytes


class Feed:
    """A lane's events, encoded before they are needed: to send them then costs little.

    Attributes:
        symbols: of this lane alone, so that a feature's symbol tells its lane, whatever topic the
            event came by.
        warm_up: the first events: they fill the windows.
        play: those behind them; ``at_s`` counts from the first one.
    """

    def __init__(self, settings: Settings, lane: str, num_events: int, rate_hz: float) -> None:
        self.lane = lane
        self.symbols = [f"{lane.upper()}{number:02d}" for number in range(1, NUM_SYMBOLS + 1)]
        codec = Codec(settings.schema_registry)
        events = simulate(
            symbols=self.symbols, seed=1, start_time_us=_START_TIME_US, rate_hz=rate_hz
        )

        def encoded(num: int, begin_us: int) -> list[Encoded]:
            return [
                Encoded(
                    (event.event_time_us - begin_us) / 1e6,
                    event.symbol.encode(),
                    codec.encode_event(event),
                )
                for event in islice(events, num)
            ]

        self.warm_up = encoded(_WARM_UP_PER_SYMBOL * NUM_SYMBOLS, _START_TIME_US)
        begin_us = _START_TIME_US + int(self.warm_up[-1].at_s * 1e6)
        self.play = encoded(num_events, begin_us)
        seen = [sum(one.key.decode() == name for one in self.warm_up) for name in self.symbols]
        assert min(seen) > WARM_UP_EVENTS, "every window is full when the play begins"

    @property
    def num_warm_up_features(self) -> int:
        return len(self.warm_up) - WARM_UP_EVENTS * NUM_SYMBOLS


@contextmanager
def own_topics(settings: Settings, lanes: Mapping[str, LaneSettings]) -> Iterator[Settings]:
    """These settings with these lanes, on topics, groups and remembered ids that are new.

    What an earlier play left undone disturbs no later one. The topics are deleted afterwards.
    """
    suffix = uuid.uuid4().hex[:8]
    renamed = {
        name: lane.model_copy(
            update={
                key: f"{getattr(lane, key)}.{suffix}" for key in ("topic", "output_topic", "group")
            }
        )
        for name, lane in lanes.items()
    }
    redis = settings.redis.model_copy(update={"key_prefix": f"{settings.redis.key_prefix}{suffix}"})
    own = settings.model_copy(update={"lanes": renamed, "redis": redis})
    ensure_topics(own)
    try:
        yield own
    finally:
        names = [spec.name for spec in lane_topics(own)]
        admin = admin_client(settings)  # held, or its futures never complete
        for future in admin.delete_topics(names).values():
            future.result(settings.kafka.timeout_s)


def in_turn(modes: Sequence[str], number: int, num_rounds: int) -> list[str]:
    """The modes in this round's order: none is always first."""
    turn = number * len(modes) // num_rounds
    return [*modes[turn:], *modes[:turn]]


def topic_of(settings: Settings, lane: str) -> str:
    """The lane's topic; the first lane's if this one is not enabled: then that one holds all."""
    lanes = {one.name: one for one in settings.active_lanes}
    return lanes.get(lane, settings.active_lanes[0]).topic


class Sender:
    """Sends encoded events; every send is acknowledged when the context ends."""

    def __init__(self, settings: Settings, *, linger_ms: float = 1) -> None:
        self._settings = settings
        self._producer: Producer = make_client(
            Producer,
            client_config(settings, defaults={"linger.ms": linger_ms}, required=IDEMPOTENT),
        )

    def __enter__(self) -> "Sender":
        return self

    def __exit__(self, *_: object) -> None:
        left = self._producer.flush(60)
        assert not left, f"{left} events are not acknowledged"

    def send(self, lane: str, events: Sequence[Encoded]) -> None:
        """As fast as the broker takes them."""
        topic = topic_of(self._settings, lane)
        for event in events:
            while not self._try_send(topic, event):
                self._producer.poll(0.01)
        self._producer.poll(0)

    def send_when_due(self, lane: str, events: Sequence[Encoded], begin_s: float) -> None:
        """Each at its time on the tape, which begins at ``begin_s`` (``time.monotonic``)."""
        for event in events:
            if (ahead_s := begin_s + event.at_s - time.monotonic()) > 0:
                time.sleep(ahead_s)
            self.send(lane, [event])

    def send_steadily(
        self, feeds: Mapping[str, Sequence[Encoded]], begin_s: float, seconds: float
    ) -> None:
        """All of every lane's, at the even rate that makes them last for ``seconds``."""
        sent = dict.fromkeys(feeds, 0)
        while any(sent[lane] < len(events) for lane, events in feeds.items()):
            share = min((time.monotonic() - begin_s) / seconds, 1.0)
            for lane, events in feeds.items():
                due = int(len(events) * share)
                self.send(lane, events[sent[lane] : due])
                sent[lane] = due
            time.sleep(_TICK_S)

    def _try_send(self, topic: str, event: Encoded) -> bool:
        try:
            self._producer.produce(topic, event.value, event.key)
        except BufferError:
            return False
        return True


def warm_up(settings: Settings, feeds: Sequence[Feed]) -> None:
    """Fills every window, and waits until all features that must come of it have been read."""
    events = {feed.lane: feed.warm_up for feed in feeds}
    num_features = sum(feed.num_warm_up_features for feed in feeds)
    _send_at_once(settings, events, num_features, _START_S)


def work_off(settings: Settings, feeds: Sequence[Feed]) -> list[Passage]:
    """Appends all events at once and waits until every feature has been read."""
    events = {feed.lane: feed.play for feed in feeds}
    return _send_at_once(settings, events, sum(map(len, events.values())))


def _send_at_once(
    settings: Settings,
    events: Mapping[str, Sequence[Encoded]],
    num_features: int,
    idle_timeout_s: float = _IDLE_S,
) -> list[Passage]:
    with FeatureSubscriber(
        settings, limit=num_features, idle_timeout_s=idle_timeout_s
    ) as subscriber:
        reader = Reader(subscriber)
        with Sender(settings) as sender:
            for lane, some in events.items():
                sender.send(lane, some)
        return _demand(reader.join(), num_features)


def _demand(passages: list[Passage], num_features: int) -> list[Passage]:
    if len(passages) < num_features:
        raise SystemExit(f"{len(passages)} features of {num_features} came")
    return passages


def play(
    settings: Settings, feed: Feed, others: Sequence[Feed] = (), *, seconds: float
) -> list[Passage]:
    """The first feed's events when they are due, the others' evenly beside them.

    Returns the passages of the first feed, all of them. Raises SystemExit if one is missing.
    """
    subscriber = FeatureSubscriber(
        settings,
        lanes=[settings.active_lanes[0].name],
        symbols=feed.symbols,
        limit=len(feed.play),
        idle_timeout_s=_IDLE_S,
    )
    with subscriber, Sender(settings) as sender, Sender(settings, linger_ms=20) as others_sender:
        reader = Reader(subscriber)
        begin_s = time.monotonic()
        beside = threading.Thread(
            target=others_sender.send_steadily,
            args=({other.lane: other.play for other in others}, begin_s, seconds),
        )
        beside.start()
        sender.send_when_due(feed.lane, feed.play, begin_s)
        beside.join()
        return _demand(reader.join(), len(feed.play))


class Feature(NamedTuple):
    """One that was published: whose, and when the broker appended its event and it."""

    lane: str
    event_us: int
    feature_us: int


def read_back(settings: Settings, feeds: Sequence[Feed]) -> list[Feature]:
    """Every feature in the output topics, in the order of their appends. No worker may run."""
    lane_of = {symbol: feed.lane for feed in feeds for symbol in feed.symbols}
    with FeatureSubscriber(
        settings, start="earliest", idle_timeout_s=_READ_BACK_IDLE_S
    ) as subscriber:
        features = [
            Feature(
                lane_of[record.feature.symbol], record.source_appended_us or 0, record.appended_us
            )
            for record in subscriber.records()
        ]
    return sorted(features, key=lambda one: one.feature_us)


def learned_service_s(settings: Settings) -> dict[int, float]:
    """Seconds of the model by batch bucket, as the worker has learned them: its metrics say."""
    return {
        int(labels["bucket"]): value
        for name, labels, value in worker_metrics(settings)
        if name == "tapeline_service_seconds"
    }
