"""A worker's lasting name: no other worker has it now, and a restart gets it again.

The broker knows a worker by it: a new holder of a ``transactional.id`` fences the old one and ends
what it left open, and a static member is back in its place without a rebalance.
"""

import fcntl
import hashlib
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from schemas.errors import ConfigError
from schemas.settings import Settings

_MAX_SLOTS = 256
_NOT_ALLOWED = re.compile(r"[^A-Za-z0-9._-]")


def needs_name(settings: Settings) -> bool:
    """Whether the settings ask for what only a named worker can do."""
    return settings.worker.delivery == "exactly_once" or settings.worker.static_membership


@contextmanager
def claimed_name(settings: Settings) -> Iterator[str | None]:
    """``worker.instance_id``, else the first free slot of this machine; None if none is needed.

    A slot is a locked file under ``state_dir``: the kernel frees it when its holder ends, however
    it ends, so a worker that was killed has its name again.

    Raises ConfigError: the folder cannot be written to, or every slot is taken.
    """
    if not needs_name(settings):
        yield None
        return
    if settings.worker.instance_id:
        yield settings.worker.instance_id
        return
    name, lock = _claim_slot(settings)
    with lock:
        yield name


def _claim_slot(settings: Settings) -> tuple[str, IO[str]]:
    """A free slot's name and its locked file."""
    folder = settings.state_dir.resolve() / "workers"
    # One machine may hold several state folders; a folder may be shared by several machines.
    where = hashlib.sha256(str(folder).encode()).hexdigest()[:6]
    host = _NOT_ALLOWED.sub("-", socket.gethostname())[:64]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for slot in range(_MAX_SLOTS):
            name = f"{host}-{where}-{slot}"
            lock = (folder / f"{name}.lock").open("a")
            if _try_lock(lock):
                return name, lock
            lock.close()
    except OSError as error:
        raise ConfigError(
            f"cannot claim a name in {folder}: {error.strerror}; set worker.instance_id, or point "
            "TAPELINE_STATE_DIR at a folder of yours"
        ) from error
    raise ConfigError(f"{_MAX_SLOTS} workers run here already; set worker.instance_id")


def replica_name(settings: Settings, rank: int) -> str | None:
    """The name of a replica on Ray Serve, which ranks them from 0 without gaps."""
    if not needs_name(settings):
        return None
    return f"{settings.worker.instance_id or settings.serve.app_name}-{rank}"


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
