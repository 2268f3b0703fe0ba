"""Windows in memory that caller and replica both see: the call itself carries only its name.

A caller writes a micro-batch into a ``Block`` and sends the block's ``BlockName``; a replica on the
same machine opens it, and writes its answer over the question. Nothing is named in a file system:
the memory is gone when the last process that sees it ends, however it ends.

Linux only, and only between processes that may see each other's descriptors: those of one user, in
one container or in none. Elsewhere ``Mappings.open`` finds nothing, and windows travel by value.
"""

import fcntl
import mmap
import os
import secrets
import sys
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from inference.client import Inference

_SMALLEST = 1 << 20  # bytes; sizes are rounded up to powers of two, so that blocks are used again

CAN_SHARE = sys.platform == "linux"


@dataclass(frozen=True, slots=True)
class BlockName:
    """Where a block is found: its owner's descriptor, and a token that no other block has."""

    pid: int
    descriptor: int
    token: str

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.descriptor}"

    def is_there(self) -> bool:
        """Whether that descriptor still is this block: numbers of processes and of descriptors are
        used again, and are other ones on another machine.
        """
        try:
            return os.readlink(self.path).startswith(f"/memfd:{self.token} ")
        except OSError:
            return False


class Block:
    """Memory of this process that others may open by ``name`` while this object lives."""

    def __init__(self, num_bytes: int) -> None:
        token = f"tapeline-{secrets.token_hex(16)}"
        self._descriptor = os.memfd_create(token, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.num_bytes = max(_SMALLEST, 1 << (num_bytes - 1).bit_length())
        os.ftruncate(self._descriptor, self.num_bytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
        self.name = BlockName(os.getpid(), self._descriptor, token)
        self.floats = _floats(self._descriptor)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class Blocks:
    """Blocks for calls that overlap: as many as there ever were at once."""

    def __init__(self) -> None:
        self._free: list[Block] = []

    def take(self, num_bytes: int) -> Block:
        """One of at least that size. Hand it back when the answer has been read, or drop it: after
        a call that failed, its replica may still write there.
        """
        while self._free:
            block = self._free.pop()
            if block.num_bytes >= num_bytes:
                return block
        return Block(num_bytes)

    def give_back(self, block: Block) -> None:
        self._free.append(block)


@dataclass(frozen=True, slots=True)
class Written:
    """An answer that lies in the caller's block: features (B, F), then scores (B, S), float32."""

    num_windows: int
    num_features: int
    num_scores: int
    model_version: str

    @classmethod
    def over(cls, floats: NDArray[np.float32], inference: Inference) -> Self | None:
        """Writes it; None if there is no room for it."""
        features, scores = inference.features, inference.scores
        if features.size + scores.size > len(floats):
            return None
        floats[: features.size] = features.reshape(-1)
        floats[features.size : features.size + scores.size] = scores.reshape(-1)
        return cls(len(features), features.shape[1], scores.shape[1], inference.model_version)

    def read(self, floats: NDArray[np.float32]) -> Inference:
        """A copy: the block is free again."""
        rows = self.num_windows
        end = rows * self.num_features
        features = floats[:end].reshape(rows, self.num_features)
        scores = floats[end : end + rows * self.num_scores].reshape(rows, self.num_scores)
        return Inference(features.copy(), scores.copy(), self.model_version)


class Mappings:
    """The blocks that this process has opened."""

    def __init__(self) -> None:
        self._floats: dict[BlockName, NDArray[np.float32]] = {}

    def open(self, name: BlockName) -> NDArray[np.float32] | None:
        """Its memory, float32, one-dimensional; None where it is out of reach."""
        if name not in self._floats:
            self._floats = {one: seen for one, seen in self._floats.items() if one.is_there()}
            if not name.is_there():
                return None
            try:
                descriptor = os.open(name.path, os.O_RDWR | os.O_CLOEXEC)
            except OSError:
                return None
            try:
                self._floats[name] = _floats(descriptor)
            finally:
                os.close(descriptor)
        return self._floats[name]


def _floats(descriptor: int) -> NDArray[np.float32]:
    """The array owns the mapping."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.float32)
