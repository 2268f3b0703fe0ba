"""Finds the variant of a model that runs fastest here and still is that model.

One change after the other, each on top of those kept. A change stays only if its outputs are within
``max_error`` of the fp32 reference and its calls measure faster, in one run, taking turns with what
it would replace.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import prune

from inference.artifact import Artifact, typical_windows
from inference.bench import compare_calls, hardware
from inference.engine import Device, Engine, resolve_device
from schemas.errors import ConfigError, TransientError

DEFAULT_MAX_ERROR = 0.01
_MIN_GAIN = 1.03  # less is noise
_NUM_TYPICAL = 64

Change = Callable[[Artifact], Artifact]


@dataclass(frozen=True, slots=True)
class Step:
    """One change that was tried.

    Attributes:
        kept: it is part of the result.
        why: in words.
        max_error: largest absolute difference of an output from fp32; None if it did not run.
        call_ms: by windows in a call: the median without the change and with it.
        gain: how many times faster, geometric mean over ``call_ms``; None if it was not timed.
        row_invariant: a window's bits do not depend on its micro-batch.
    """

    change: str
    kept: bool
    why: str
    max_error: float | None = None
    gain: float | None = None
    call_ms: Mapping[int, tuple[float, float]] | None = None
    row_invariant: bool | None = None


@dataclass(frozen=True, slots=True)
class Optimized:
    """What came of it.

    Attributes:
        artifact: the given one if no change was kept.
    """

    artifact: Artifact
    hardware: str
    max_error: float
    steps: tuple[Step, ...]


def optimize(
    artifact: Artifact,
    *,
    device: Device = "auto",
    num_threads: int = 1,
    max_batch: int = 256,
    gpu_memory_fraction: float = 1.0,
    max_error: float = DEFAULT_MAX_ERROR,
    prune_amount: float = 0.0,
    on_step: Callable[[Step], None] = lambda _: None,
) -> Optimized:
    """Tries every change that this device has.

    Args:
        max_error: of any feature or score, absolute; the result's ``tolerance`` if anything but
            exact arithmetic is kept.
        prune_amount: of each convolution's weights, 0 to 1: the smallest are set to 0. 0: not
            tried.
        on_step: told of each step when it is decided.

    Raises:
        ConfigError: the artifact is not fp32, or its reference cannot be met on this device.
    """
    if artifact.precision != "fp32":
        raise ConfigError(
            f"{artifact.model_version} is a {artifact.precision} variant already; "
            "optimise the fp32 artifact that it was made from"
        )
    kind = resolve_device(device).type
    load = partial(
        Engine,
        device=device,
        num_threads=num_threads,
        max_batch=max_batch,
        gpu_memory_fraction=gpu_memory_fraction,
    )
    best = artifact.as_variant(cuda_graphs=False)
    judge = _Judge(best, load, max_error, sizes=sorted({1, min(32, max_batch), max_batch}))
    steps: list[Step] = []
    for name, change in _changes(kind, prune_amount):
        candidate = change(best).as_variant(tolerance=max(max_error, artifact.tolerance))
        step = judge.decide(name, candidate)
        if step.kept:
            best = candidate
        steps.append(step)
        on_step(step)
    if kind == "cpu":
        best = best.as_variant(cuda_graphs=True)  # says nothing on a CPU; a GPU wants them
    if best.model_version == artifact.model_version:  # the same arithmetic: nothing is less exact
        best = best.as_variant(tolerance=artifact.tolerance)
    return Optimized(best, hardware(kind), max_error, tuple(steps))


class _Judge:
    """Compares candidates with the best so far and with what fp32 gives.

    Args:
        artifact: fp32, the first best.
        sizes: windows in the calls that are timed.
    """

    def __init__(
        self,
        artifact: Artifact,
        load: Callable[[Artifact], Engine],
        max_error: float,
        sizes: Sequence[int],
    ) -> None:
        typical = typical_windows(artifact.config, artifact.normalisation, _NUM_TYPICAL, seed=3)
        self._windows = np.concatenate([artifact.reference.windows, typical])
        self._artifact = artifact
        self._load = load
        self._max_error = max_error
        self._sizes = sizes
        self._best = load(artifact)
        self._expected = _outputs(self._best, self._windows)

    def decide(self, name: str, candidate: Artifact) -> Step:
        """A candidate that is kept is the best from then on."""
        try:
            tried = self._load(candidate)
        except (ConfigError, TransientError, RuntimeError) as error:  # beyond what this device can
            return Step(name, False, f"does not run here: {str(error).splitlines()[0]}")
        off = float(np.abs(_outputs(tried, self._windows) - self._expected).max())
        step = Step(name, False, "", max_error=off, row_invariant=tried.row_invariant)
        if not off <= self._max_error:  # so that NaN fails too
            why = f"outputs are off by {off:.2g}, more than {self._max_error:g}"
            return replace(step, why=why)
        if self._best.row_invariant and not tried.row_invariant:
            return replace(step, why="a window's bits would depend on its micro-batch")
        engines = [self._best, tried]
        pairs = {size: compare_calls(engines, self._artifact, size) for size in self._sizes}
        gain = math.exp(sum(math.log(old / new) for old, new in pairs.values()) / len(pairs))
        kept = gain >= _MIN_GAIN
        if kept:
            self._best = tried
        return replace(
            step,
            kept=kept,
            why=f"{gain:.2f} times as fast" if kept else f"no faster ({gain:.2f} times)",
            gain=gain,
            call_ms={size: (round(old, 3), round(new, 3)) for size, (old, new) in pairs.items()},
        )


def _outputs(engine: Engine, windows: NDArray[np.float32]) -> NDArray[np.float32]:
    inference = engine.infer(windows)
    return np.concatenate([inference.features, inference.scores], axis=1)


def _changes(device: str, prune_amount: float) -> Iterator[tuple[str, Change]]:
    if device == "cuda":
        yield "CUDA graphs", lambda one: one.as_variant(cuda_graphs=True)
    if prune_amount:
        name = f"l1 pruning of convolutions, {prune_amount:.0%}"
        yield name, lambda one: one.as_variant(weights=_pruned(one, prune_amount))
    if device == "cuda":
        yield "TF32", lambda one: one.as_variant(precision="tf32")
    yield "bf16", lambda one: one.as_variant(precision="bf16")
    if device == "cuda":  # a CPU has no arithmetic for it
        yield "fp16", lambda one: one.as_variant(precision="fp16")


def _pruned(artifact: Artifact, amount: float) -> dict[str, Tensor]:
    model = artifact.build_model()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d):
            prune.l1_unstructured(layer, "weight", amount)  # type: ignore[no-untyped-call]
            prune.remove(layer, "weight")  # type: ignore[no-untyped-call]
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
