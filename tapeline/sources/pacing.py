"""When to send each event of a replay. Pure: the caller sleeps."""

import math
from collections.abc import Iterable, Iterator

from schemas.errors import ConfigError
from schemas.messages import MarketEvent


def parse_speed(text: str) -> float | None:
    """``max`` is None; ``1`` or ``10`` a factor. Raises ConfigError for anything else."""
    if text.strip().lower() == "max":
        return None
    try:
        speed = float(text)
    except ValueError:
        speed = math.nan
    if not 0 < speed < math.inf:
        raise ConfigError(
            f"speed {text!r} is neither max nor a positive number; 1 is the recorded pace, 10 is "
            "ten times as fast"
        )
    return speed


def pace(events: Iterable[MarketEvent], speed: float | None) -> Iterator[tuple[MarketEvent, float]]:
    """Yields (event, due_s): the time to send it, seconds after the first one.

    ``speed`` divides the recorded times between events; None is as fast as it goes, due at 0.
    Due times never go back: an event older than its predecessor is due with it.
    """
    assert speed is None or speed > 0
    first_us: int | None = None
    due_s = 0.0
    for event in events:
        if speed is not None:
            if first_us is None:
                first_us = event.event_time_us
            due_s = max(due_s, (event.event_time_us - first_us) / (1e6 * speed))
        yield event, due_s
