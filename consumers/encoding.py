"""Features as Avro, a micro-batch at once: the bytes that ``schemas.codec`` would write.

Compiled, for fastavro takes ten times as long; tests/property/test_columns.py compares the two.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from consumers.compiled import compiled
from inference.client import Inference
from schemas.codec import Codec

_LONG_BYTES = 10  # of the longest


class Sources(NamedTuple):
    """The records that features are made of: one of each, in their order.

    Attributes:
        heads: as in ``consumers.columns``.
    """

    heads: Sequence[bytes]
    partitions: Sequence[int]
    offsets: Sequence[int]
    appended_us: Sequence[int]


class FeatureEncoder:
    """Writes the features of one worker. Compiles its code when it is made.

    Args:
        channels_version: of the windows that they come from.
        score_names: of the model's scores, in their order.
    """

    def __init__(self, codec: Codec, channels_version: str, score_names: Sequence[str]) -> None:
        self._codec = codec
        self._channels_version = channels_version
        names = [_string(name) for name in score_names]
        self._names = _bytes(b"".join(names))
        self._name_ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        nothing = Inference(np.zeros((1, 1), np.float32), np.zeros((1, len(names)), np.float32), "")
        self._encode(b"", b"", Sources([b""], [0], [0], [0]), nothing, [0], np.zeros(1, np.uint8))

    def encode(
        self,
        lane: str,
        topic: str,
        sources: Sources,
        inference: Inference,
        rows: Sequence[int],
        flags: NDArray[np.uint8],
    ) -> list[bytes]:
        """Values of the features of ``n`` events of one lane and topic.

        Args:
            rows: of ``inference``, (n,).
            flags: uint8, (n,).
        """
        names = (lane, inference.model_version, self._channels_version, topic)
        middle = b"".join(map(_string, names))
        return self._encode(self._codec.feature_prefix, middle, sources, inference, rows, flags)

    def _encode(
        self,
        prefix: bytes,
        middle: bytes,
        sources: Sources,
        inference: Inference,
        rows: Sequence[int],
        flags: NDArray[np.uint8],
    ) -> list[bytes]:
        places = np.array(rows, np.int64)
        head_bytes = np.fromiter(map(len, sources.heads), np.int64, len(rows))
        features, scores = inference.features, inference.scores
        fixed = len(prefix) + len(middle) + 4 * features.shape[1]
        fixed += 4 * scores.shape[1] + len(self._names) + 8 * _LONG_BYTES
        out = np.empty(int(head_bytes.sum()) + fixed * len(rows), np.uint8)
        ends = np.empty(len(rows), np.int64)
        _write(
            _bytes(b"".join(sources.heads)),
            np.cumsum(head_bytes),
            _bytes(prefix),
            _bytes(middle),
            np.array([sources.partitions, sources.offsets, sources.appended_us], np.int64),
            _as_bytes(features[places]),
            _as_bytes(scores[places]),
            self._names,
            self._name_ends,
            flags,
            out,
            ends,
        )
        cuts = [0, *ends.tolist()]
        written = out[: cuts[-1]].tobytes()
        return [written[a:b] for a, b in pairwise(cuts)]


def _string(text: str) -> bytes:
    """An Avro string."""
    content = text.encode()
    size, head = 2 * len(content), bytearray()
    while size > 0x7F:
        head.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*head, size]) + content


def _bytes(content: bytes) -> NDArray[np.uint8]:
    """Read-only, whatever it holds: compiled code is made for one kind of array."""
    return np.frombuffer(content + b"\0", np.uint8)[:-1]


def _as_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(n, k) to (n, 4 k)."""
    num, size = values.shape
    return np.ascontiguousarray(values, "<f4").view(np.uint8).reshape(num, 4 * size)


@compiled
def _put(out: NDArray[np.uint8], at: int, content: NDArray[np.uint8]) -> int:
    for place in range(len(content)):
        out[at + place] = content[place]
    return at + len(content)


@compiled
def _put_long(out: NDArray[np.uint8], at: int, value: int) -> int:
    """Avro's long, of a number that is not negative."""
    bits = np.uint64(value) << np.uint64(1)
    while bits > np.uint64(0x7F):
        out[at] = (bits & np.uint64(0x7F)) | np.uint64(0x80)
        bits >>= np.uint64(7)
        at += 1
    out[at] = bits
    return at + 1


@compiled
def _write(
    heads: NDArray[np.uint8],
    head_ends: NDArray[np.int64],
    prefix: NDArray[np.uint8],
    middle: NDArray[np.uint8],
    places: NDArray[np.int64],
    features: NDArray[np.uint8],
    scores: NDArray[np.uint8],
    names: NDArray[np.uint8],
    name_ends: NDArray[np.int64],
    flags: NDArray[np.uint8],
    out: NDArray[np.uint8],
    ends: NDArray[np.int64],
) -> None:
    """One record behind the other, each in the order of the schema's fields."""
    at, num_scores = 0, len(name_ends)
    for row in range(len(head_ends)):
        at = _put(out, at, prefix)
        at = _put(out, at, heads[head_ends[row - 1] if row else 0 : head_ends[row]])
        at = _put(out, at, middle)
        at = _put_long(out, at, places[0, row])
        at = _put_long(out, at, places[1, row])
        at = _put_long(out, at, features.shape[1])
        at = _put(out, at, features[row])
        if num_scores:
            at = _put_long(out, at, num_scores)
            for score in range(num_scores):
                at = _put(out, at, names[name_ends[score - 1] if score else 0 : name_ends[score]])
                at = _put(out, at, scores[row, 4 * score : 4 * score + 4])
        at = _put_long(out, at, 0)
        at = _put_long(out, at, flags[row])
        at = _put_long(out, at, places[2, row])
        ends[row] = at
