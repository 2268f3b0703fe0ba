"""Retries of what may heal: exponential backoff with full jitter, until a deadline."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from schemas.errors import TransientError

T = TypeVar("T")

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_log = structlog.get_logger(__name__)


async def retrying(what: str, call: Callable[[], Awaitable[T]], deadline_s: float) -> T:
    """Calls until it does not raise TransientError; after ``deadline_s`` that error surfaces."""
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + deadline_s
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except TransientError as error:
            if loop.time() + pause_s > give_up_s:
                raise
            _log.warning("retrying", what=what, error=str(error))
        await asyncio.sleep(random.uniform(0, pause_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
