"""Where log lines go: to stderr, readable on a terminal, JSON lines elsewhere."""

import logging
import sys

import structlog

_SECRETS = ("password", "secret", "token", "sasl", "key.pem")


def configure_logging(level: str = "info") -> None:
    """Sets structlog up for this process; librdkafka's own lines join it, from errors on."""
    librdkafka = logging.getLogger("librdkafka")
    librdkafka.addHandler(logging.StreamHandler(sys.stderr))
    librdkafka.setLevel(logging.ERROR)
    librdkafka.propagate = False
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _redact,
            structlog.dev.ConsoleRenderer()
            if sys.stderr.isatty()
            else structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=lambda *args: structlog.PrintLogger(sys.stderr),  # as it is by then
        cache_logger_on_first_use=False,
    )


def _redact(
    logger: object, method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    for name in event:
        if any(secret in name.lower() for secret in _SECRETS):
            event[name] = "***"
    return event
