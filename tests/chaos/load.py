"""A steady load that knows exactly what the broker acknowledged."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random

from confluent_kafka import Producer

from schemas.codec import Codec
from schemas.kafka import client_config, make_client
from schemas.messages import MarketEvent
from schemas.settings import Settings
from tapeline.producer import Delivery, MarketEventProducer
from tapeline.simulator import simulate, symbol_names

WARM_UP = 59  # events of a symbol that fill its window and give no feature
_DELIVERY_TIMEOUT_S = 300
_NUM_RECENT = 500


@dataclass(slots=True)
class Intent:
    """What was produced, and what of it was acknowledged.

    Attributes:
        warm_up: ids of events that fill windows.
        expected: ids of events that must each give one feature.
        poison: ``topic:partition:offset`` of records that must each give one dead letter.
        num_records: acknowledged records, duplicates and poison included.
        num_duplicates: of them, second copies of an event.
    """

    warm_up: set[str] = field(default_factory=set)
    expected: set[str] = field(default_factory=set)
    poison: set[str] = field(default_factory=set)
    num_records: int = 0
    num_duplicates: int = 0


class Load:
    """Produces events at a set rate from a thread, with duplicates and poison among them.

    Every symbol lives on every lane. First each fills its windows there, as fast as it goes and
    without duplicates, so that from then on every event must give exactly one feature, whichever
    of its copies counts.

    Args:
        across_lanes: whether some duplicates go to another lane than the first copy.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        seed: int,
        rate_hz: float,
        across_lanes: bool = True,
        duplicate_ratio: float = 0.05,
        poison_ratio: float = 0.01,
    ) -> None:
        self.intent = Intent()
        self._settings = settings
        self._lanes = [lane.name for lane in settings.active_lanes]
        self._chance = Random(f"load:{seed}")
        self._rate_hz = rate_hz
        self._across_lanes = across_lanes
        self._duplicate_ratio = duplicate_ratio
        self._poison_ratio = poison_ratio
        self._events: Iterator[MarketEvent] = simulate(
            symbols=symbol_names(4), seed=seed, start_time_us=10**15
        )
        self._recent: deque[tuple[MarketEvent, str]] = deque(maxlen=_NUM_RECENT)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="load")
        self._producer = MarketEventProducer(settings, delivery_timeout_s=_DELIVERY_TIMEOUT_S)
        self._codec = Codec(settings.schema_registry)
        self._raw: Producer = make_client(
            Producer,
            client_config(
                settings,
                defaults={"delivery.timeout.ms": _DELIVERY_TIMEOUT_S * 1000},
                # One at a time: the answer to a later one would acknowledge it without its offset.
                required={"enable.idempotence": True, "max.in.flight": 1},
            ),
        )

    def start(self) -> None:
        """Fills the windows, then goes on in the background."""
        self._warm_up()
        self._thread.start()

    def check(self) -> None:
        """Raises what ended the load, if something did."""
        if self._error is not None:
            raise self._error

    def stop(self) -> Intent:
        """Ends it and waits until every record is acknowledged. Raises if one never will be."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self.check()
        self._producer.close()
        assert self._raw.flush(_DELIVERY_TIMEOUT_S) == 0, "poison that was not acknowledged"
        self.check()
        return self.intent

    def abandon(self) -> None:
        """Ends it without waiting for the broker: the end of a drill that failed."""
        self._stopping.set()
        if self._thread.is_alive():
            self._producer._producer.purge()
            self._thread.join(5)

    def _warm_up(self) -> None:
        counts: defaultdict[tuple[str, str], int] = defaultdict(int)
        wanted = 4 * len(self._lanes)
        while sum(count >= WARM_UP for count in counts.values()) < wanted:
            event, lane = next(self._events), self._chance.choice(self._lanes)
            counts[lane, event.symbol] += 1
            self._produce(event, lane, is_warm_up=counts[lane, event.symbol] <= WARM_UP)
        self._producer.flush()

    def _run(self) -> None:
        try:
            due_s = time.monotonic()
            while not self._stopping.is_set():
                self._one()
                due_s = max(due_s + 1 / self._rate_hz, time.monotonic() - 1)
                self._producer._producer.poll(max(0, due_s - time.monotonic()))
                self._raw.poll(0)
                time.sleep(max(0, due_s - time.monotonic()))
        except BaseException as error:
            self._error = error

    def _one(self) -> None:
        draw = self._chance.random()
        lane = self._chance.choice(self._lanes)
        if draw < self._poison_ratio:
            self._produce_poison(lane)
        elif draw < self._poison_ratio + self._duplicate_ratio and self._recent:
            event, first_lane = self._chance.choice(self._recent)
            self.intent.num_duplicates += 1
            self._send(event, lane if self._across_lanes else first_lane)
        else:
            event = next(self._events)
            self._produce(event, lane, is_warm_up=False)
            self._recent.append((event, lane))

    def _produce(self, event: MarketEvent, lane: str, *, is_warm_up: bool) -> None:
        (self.intent.warm_up if is_warm_up else self.intent.expected).add(event.event_id)
        self._send(event, lane)

    def _send(self, event: MarketEvent, lane: str) -> None:
        self._producer.produce(event, lane=lane, on_delivery=self._on_delivery)

    def _on_delivery(self, delivery: Delivery) -> None:
        self.intent.num_records += 1

    def _produce_poison(self, lane: str) -> None:
        """Random bytes, or a real event without its end."""
        value = self._codec.encode_event(next(self._events))
        cut = self._chance.randint(0, len(value) - 1)
        if self._chance.random() < 0.5:
            value = self._chance.randbytes(cut)
        symbol = self._chance.choice(symbol_names(4))

        def note(error: object, message: object) -> None:
            if error is not None:
                self._error = RuntimeError(f"poison was not acknowledged: {error}")
                return
            self.intent.num_records += 1
            source = f"{message.topic()}:{message.partition()}:{message.offset()}"  # type: ignore[attr-defined]
            self.intent.poison.add(source)

        topic = self._settings.lane(lane).topic
        self._raw.produce(topic, value[:cut], symbol, on_delivery=note)
