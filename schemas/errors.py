"""Errors, one class per reaction. Whoever catches one knows what to do by its type alone.

    Exception
    └── TapelineError
        ├── TransientError    retry with jittered backoff until a deadline
        ├── PoisonRecord      dead letter; the lane moves on
        ├── AssignmentLost    drop in-flight work, commit nothing, go on from the last commit
        ├── DeadLetterFlood   stop: a person must look; exit 1
        └── ConfigError       say what, where and how to mend it; exit 2

A broken ``assert`` is a bug of ours: the worker crashes and restarts from its last commit.
"""

from typing import Literal

Stage = Literal["decode", "window", "infer"]


class TapelineError(Exception):
    """Base of every error that Tapeline raises on purpose."""


class TransientError(TapelineError):
    """Something outside failed and may work again: a broker, Redis, a model replica."""


class PoisonRecord(TapelineError):
    """One record can never be processed, however often it is tried.

    Attributes:
        stage: the stage that refused it.
        reason: a short fixed slug, fit for a metric label and a DLQ filter (``bad_avro``).
    """

    def __init__(self, stage: Stage, reason: str, message: str) -> None:
        super().__init__(message)
        self.stage = stage
        self.reason = reason


class AssignmentLost(TapelineError):
    """What is in flight is void: the broker refused its transaction, most often because the
    partitions belong to another worker by now. Whoever owns them begins at the last commit.
    """


class DeadLetterFlood(TapelineError):
    """So many dead letters that they are an outage, not noise; nothing more is committed."""


class ConfigError(TapelineError):
    """The user asked for something that cannot work.

    The text is one clear sentence that names the mend. The CLI prints it and exits with 2.
    """
