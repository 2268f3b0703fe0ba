"""What the lanes ask for, looked at by a thread: whoever decides only reads."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from schemas.errors import TapelineError
from schemas.settings import Settings
from tapeline.autoscale.rules import LaneLoad
from tapeline.lag import LagReader, PartitionLag

_RATE_WEIGHT = 0.4  # of the newest difference
_ABANDONED_AFTER_S = 60.0  # without a question: whoever asked is gone, and Serve does not say so
_observers: dict[str, "Observer"] = {}
_observers_lock = threading.Lock()
_log = logging.getLogger("ray.serve.tapeline")  # it runs in Serve's controller


@dataclass(frozen=True, slots=True)
class Observation:
    """A good look at the broker.

    Attributes:
        number: counts them, from 1.
        at_s: when, on the monotonic clock.
    """

    number: int
    at_s: float
    lanes: tuple[LaneLoad, ...]


class LoadMeter:
    """Turns offsets, look by look, into rates. Sans-IO.

    An end that went back, of a topic that was made anew say, counts from there.
    """

    def __init__(self, settings: Settings) -> None:
        default_s = settings.autoscale.drain_target_s
        self._drain_s = {
            lane.name: lane.drain_target_s or default_s for lane in settings.active_lanes
        }
        self._ends: dict[tuple[str, int], int] = {}
        self._rates: dict[tuple[str, int], float] = {}
        self._at_s: float | None = None

    def look(self, lags: Sequence[PartitionLag], at_s: float) -> tuple[LaneLoad, ...]:
        """The lanes' loads; rates are 0 at the first look."""
        passed_s = None if self._at_s is None else at_s - self._at_s
        loads: dict[str, tuple[float, int, int]] = dict.fromkeys(self._drain_s, (0.0, 0, 0))
        for one in lags:
            rate = self._rate(one, passed_s)
            lane_rate, lag, num_busy = loads[one.lane]
            is_busy = one.lag > 0 or rate > 0
            loads[one.lane] = (lane_rate + rate, lag + one.lag, num_busy + is_busy)
        self._at_s = at_s
        return tuple(
            LaneLoad(name, rate, lag, self._drain_s[name], num_busy)
            for name, (rate, lag, num_busy) in loads.items()
        )

    def _rate(self, one: PartitionLag, passed_s: float | None) -> float:
        where = (one.topic, one.partition)
        before = self._ends.get(where)
        self._ends[where] = one.end
        if before is None or not passed_s or one.end < before:
            self._rates.pop(where, None)
            return 0.0
        newest = (one.end - before) / passed_s
        old = self._rates.get(where, newest)
        rate = old + _RATE_WEIGHT * (newest - old)
        # What has ended is not to linger as a tail of ever smaller rates.
        self._rates[where] = rate if newest or rate > 0.01 else 0.0
        return self._rates[where]


class Observer:
    """A thread that looks at the broker every ``autoscale.period_s``, until it is stopped or nobody
    asks any more.

    What goes wrong is noted and tried again; the last good look stays, and gets older.
    """

    def __init__(
        self, settings: Settings, connect: Callable[[Settings], LagReader] = LagReader
    ) -> None:
        self._settings = settings
        self._connect = connect
        self._meter = LoadMeter(settings)
        self._last: Observation | None = None
        self._error: str | None = None
        self._num_errors = 0
        self._asked_s = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoscale-observer", daemon=True)
        self._thread.start()

    def latest(self) -> tuple[Observation | None, str | None]:
        """The last good look, and what went wrong since; never blocks."""
        self._asked_s = time.monotonic()
        return self._last, self._error

    @property
    def is_looking(self) -> bool:
        return self._thread.is_alive()

    @property
    def num_errors(self) -> int:
        return self._num_errors

    def stop(self) -> None:
        """Ends the thread; waits for a look that is on its way."""
        self._stopping.set()
        self._thread.join(self._settings.kafka.timeout_s * 3)

    def _run(self) -> None:
        reader: LagReader | None = None
        while not self._stopping.is_set():
            begun_s = time.monotonic()
            if begun_s - self._asked_s > _ABANDONED_AFTER_S:
                break
            try:
                reader = reader or self._connect(self._settings)
                lags = reader.read()
                lanes = self._meter.look(lags, reader.ended_s)
                number = self._last.number + 1 if self._last else 1
                self._last, self._error = Observation(number, reader.ended_s, lanes), None
            except Exception as error:  # the controller lives on, whatever Kafka's client does
                self._num_errors += 1
                self._error = str(error)
                _log.warning(
                    "cannot look at the lanes: %s",
                    error,
                    exc_info=not isinstance(error, TapelineError),
                )
                if reader is not None:
                    reader.close()
                    reader = None
            left_s = self._settings.autoscale.period_s - (time.monotonic() - begun_s)
            self._stopping.wait(max(left_s, 0.0))
        if reader is not None:
            reader.close()


def observer_of(settings: Settings) -> Observer:
    """One for all policies of an application; the one of its earlier settings ends."""
    key = settings.serve.app_name
    wanted = settings.model_dump_json()
    with _observers_lock:
        for name, observer in list(_observers.items()):
            app_name, _, of = name.partition("\n")
            if app_name == key:
                if of == wanted and observer.is_looking:
                    return observer
                del _observers[name]
                threading.Thread(target=observer.stop, daemon=True).start()
        observer = _observers[f"{key}\n{wanted}"] = Observer(settings)
        return observer
