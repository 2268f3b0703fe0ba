"""What every contender does to an event; free of Tapeline, for it runs in their environments.

Decode Avro, keep the symbol's last 60 rows of 50 values, ask the model, encode Avro. The model is
as small as can be, a mean, so that what is measured is the framework around it.
"""

import io
import json
import os
from pathlib import Path
from typing import Any

import fastavro
import numpy as np

NUM_CHANNELS, NUM_STEPS, NUM_FEATURES = 50, 60, 8
TAG_BYTES = 10  # which schema wrote a message

_schemas = Path(os.environ["COMPARE_SCHEMAS"])
_event = fastavro.parse_schema(json.loads((_schemas / "market_event.avsc").read_text()))
_feature = fastavro.parse_schema(json.loads((_schemas / "feature_vector.avsc").read_text()))


def model(windows: Any) -> Any:
    """float32 (B, C, T) to (B, F): the first channels' means."""
    return windows[:, :NUM_FEATURES].mean(axis=2)


class Windows:
    """Each symbol's last rows; nothing is kept over a restart."""

    def __init__(self) -> None:
        self._windows: dict[str, Any] = {}

    def append(self, event: dict[str, Any]) -> Any:
        """The symbol's window with this event in it, float32 (C, T)."""
        window = self._windows.get(event["symbol"])
        if window is None:
            window = self._windows[event["symbol"]] = np.zeros(
                (NUM_CHANNELS, NUM_STEPS), np.float32
            )
        window[:, :-1] = window[:, 1:]
        numbers = [value for value in event["payload"].values() if isinstance(value, float)]
        window[: len(numbers), -1] = numbers
        return window.copy()


def decode(value: bytes) -> dict[str, Any]:
    """Of Avro's single-object encoding; all events are in one schema."""
    source = io.BytesIO(value)
    source.seek(TAG_BYTES)
    event: Any = fastavro.schemaless_reader(source, _event, None)
    return dict(event)


def encode(event: dict[str, Any], features: Any) -> bytes:
    out = io.BytesIO()
    out.write(bytes(TAG_BYTES))
    fastavro.schemaless_writer(
        out,
        _feature,
        {
            "event_id": event["event_id"],
            "symbol": event["symbol"],
            "venue": event["venue"],
            "event_time_us": event["event_time_us"],
            "lane": "realtime",
            "model_version": "mean@1",
            "channels_version": "numbers",
            "source_topic": "",
            "source_partition": 0,
            "source_offset": 0,
            "features": features.tobytes(),
            "scores": {},
            "flags": 0,
            "source_appended_us": 0,
        },
    )
    return out.getvalue()


def process(windows: Windows, value: bytes) -> tuple[bytes, bytes]:
    """Key and value of the feature of one event."""
    event = decode(value)
    features = model(windows.append(event)[None])[0]
    return event["symbol"].encode(), encode(event, features)


def environment() -> tuple[str, str, str, str]:
    """Broker, topic in, topic out, group."""
    names = ("BROKER", "TOPIC_IN", "TOPIC_OUT", "GROUP")
    broker, topic_in, topic_out, group = (os.environ[f"COMPARE_{name}"] for name in names)
    return broker, topic_in, topic_out, group
