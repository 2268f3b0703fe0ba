"""Waiting for a condition instead of sleeping: quick when it holds, loud when it never does."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_PAUSE_S = 0.02


def wait_until(predicate: Callable[[], T], timeout_s: float, what: str) -> T:
    """Calls ``predicate`` until it returns something true, and returns that.

    Raises TimeoutError that says ``what`` was waited for and what the last call returned.
    """
    deadline_s = time.monotonic() + timeout_s
    while not (result := predicate()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}; the last look gave {result!r}")
        time.sleep(_PAUSE_S)
    return result
