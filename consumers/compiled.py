"""What is compiled to machine code: loops over the events of a micro-batch.

Numba compiles a function when it is first called, which takes seconds, and keeps the result on disk
for the next process (beside the module, else where ``NUMBA_CACHE_DIR`` or the user's cache is). So
whoever owns such a function calls it once when it is made, before any event waits.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compiles a function of numpy arrays and numbers; division by zero gives inf or NaN.

    Keeps Python's lock: to take it back from the other threads would cost a small micro-batch more
    than it takes.
    """
    try:
        return cast(F, numba.njit(cache=True, error_model="numpy")(function))
    except RuntimeError:  # no folder can be written to: each process compiles for itself
        return cast(F, numba.njit(error_model="numpy")(function))
