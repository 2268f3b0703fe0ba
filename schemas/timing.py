"""Where an event's time went: the stages of its way, and the header that says so."""

from collections.abc import Mapping

STAGES = ("broker", "queue", "batch", "model", "publish")
"""An event's way, in order.

broker: appended, not yet polled. queue: polled, not yet in a micro-batch. batch: decoded, dropped
if a duplicate, put into its window. model: at the model, the way there and back included. publish:
for its turn in its partition, then until all replicas have it or its transaction has ended.
"""
TIMING_HEADER = "server-timing"
"""On a feature, if ``worker.timing_header`` asks for it: milliseconds by stage up to the model's
answer, written like HTTP's Server-Timing (W3C).
"""


def encode_timing(stages_ms: Mapping[str, float]) -> bytes:
    """``broker;dur=1.200, queue;dur=0.800``."""
    return ", ".join(f"{stage};dur={ms:.3f}" for stage, ms in stages_ms.items()).encode()


def parse_timing(value: bytes) -> Mapping[str, float]:
    """Milliseconds by stage; what is no duration is left out."""
    stages_ms = {}
    for entry in value.decode(errors="replace").split(","):
        stage, _, duration = entry.strip().partition(";dur=")
        try:
            stages_ms[stage] = float(duration)
        except ValueError:
            continue
    return stages_ms
