"""The model in one process: buckets, padding, and the proof that a row's bits are its own."""

import math
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from inference.artifact import Artifact, load_artifact, typical_windows
from inference.client import Inference, ModelDescription
from inference.model import ModelConfig, Network, check_windows
from inference.passes import EagerPass, GraphPass, Pass
from inference.seeded import MARKET50_V1, seeded_artifact
from schemas.errors import ConfigError, TransientError
from schemas.placement import pin_thread
from schemas.settings import ModelSettings, WindowSettings

Device = Literal["auto", "cpu", "cuda"]

# What an engine sets on CUDA is the process's, and so is the recording of a graph: where several
# engines live in one process, one at a time may use the GPU. Calls to one are in a row anyway.
_ON_GPU = threading.Lock()

SMALLEST_BUCKET = 4  # below it, CPU kernels for vectors take over, and they round differently
_NUM_PROBES = 4
_WILD = np.float32(1e30)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class BucketStatistics:
    """One padded batch shape: its rows and how often it ran."""

    num_rows: int
    num_calls: int


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """What an engine is and did since its warm-up.

    Attributes:
        row_invariant: a window's features have the same bits whatever shares its micro-batch.
            Proven at warm-up on this machine; where False, features may differ in their last bits
            after a restart.
        num_padded_rows: rows computed for nothing, beside ``num_windows``.
        num_out_of_memory: batch shapes given up because the device had no memory left for them.
        buckets: ascending; only those that the proof left.
    """

    model_version: str
    device: str
    row_invariant: bool
    num_calls: int
    num_windows: int
    num_padded_rows: int
    num_out_of_memory: int
    buckets: tuple[BucketStatistics, ...]


class Engine:
    """An artifact on a device, warm, with a few batch shapes ("buckets") that give equal bits.

    Construction takes seconds: it runs every bucket, drops those whose kernels round differently,
    and compares the artifact's reference outputs. Calls block; of several threads they take turns,
    for they share its buffers. Give an engine one thread (``LocalInferencer`` does).

    A shape that the device has no memory for is given up, and its rows run in smaller ones.

    Side effects on the process: torch's thread count is ``num_threads``; on CUDA, TF32 is on only
    if the artifact says so, deterministic algorithms are preferred, and the memory that this
    process may take there is limited.

    Args:
        num_threads: on a CPU they compute; with a GPU they copy windows into pinned memory.
        gpu_memory_fraction: of the device, for this process.
        gpu_wait: how a CUDA graph is waited for; see ``ModelSettings``.
        max_batch: the largest bucket that is tried, 4 at least. More windows in one call are split.
        max_call_s: a bucket that takes longer when it is tried is dropped, and larger ones are not
            tried; the smallest stays whatever it takes.

    Raises:
        ConfigError: no such device, or the reference outputs are missed by more than the
            artifact's tolerance.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        device: Device = "auto",
        num_threads: int = 1,
        max_batch: int = 256,
        max_call_s: float = math.inf,
        gpu_memory_fraction: float = 1.0,
        gpu_wait: Literal["spin", "sleep"] = "spin",
    ) -> None:
        assert num_threads >= 1
        assert max_batch >= 1
        self._artifact = artifact
        self.precision = artifact.precision
        self._num_threads = num_threads
        self._turn = threading.Lock()
        self._sleeps = gpu_wait == "sleep"
        self._device = resolve_device(device)
        if self._device.type == "cuda":
            _prefer_exact_arithmetic()
            torch.cuda.set_per_process_memory_fraction(gpu_memory_fraction)
        model = artifact.build_model().to(self._device)
        self._model: Network = model.set_precision(artifact.precision)
        self._passes: dict[int, tuple[Pass, ...]] = {}
        self._num_out_of_memory = 0
        self._plans: dict[int, tuple[int, ...]] = {0: ()}
        self._buckets: tuple[int, ...] = _candidate_buckets(max_batch)
        self._max_call_s = max_call_s
        self._is_bounded = False
        self._cost_s: dict[int, float] = {}
        self.row_invariant = self._keep_equal_buckets()
        self.check_reference()
        self._num_calls = self._num_windows = self._num_padded_rows = 0
        self._calls_by_bucket: Counter[int] = Counter()

    def infer(self, windows: NDArray[np.float32]) -> Inference:
        """Takes float32 (B, C, T), any B, oldest step first. Blocks until the result is on the CPU.

        Raises:
            ValueError: another shape or dtype.
            TransientError: the device is out of memory.
        """
        check_windows(self._artifact.config, windows.shape, str(windows.dtype))
        with self._turn:
            return self._infer(windows)

    def _infer(self, windows: NDArray[np.float32]) -> Inference:
        while True:
            plan = self._plan(len(windows))
            try:
                features, scores = self._run_plan(windows, plan)
                break
            except torch.OutOfMemoryError:
                self._give_up(max(plan))
        self._num_calls += 1
        self._num_windows += len(windows)
        self._num_padded_rows += sum(plan) - len(windows)
        self._calls_by_bucket.update(plan)
        return Inference(features, scores, self._artifact.model_version)

    @property
    def model_version(self) -> str:
        return self._artifact.model_version

    def describe(self) -> ModelDescription:
        config = self._artifact.config
        return ModelDescription(
            model_version=self._artifact.model_version,
            channels_version=self._artifact.channels_version,
            num_channels=config.num_channels,
            num_steps=config.num_steps,
            num_features=config.num_features,
            score_names=config.score_names,
            device=self._device.type,
            bucket_s={bucket: self._plan_cost_s(self._plan(bucket)) for bucket in self._buckets},
            max_batch=self._buckets[-1] if self._is_bounded else None,
        )

    def statistics(self) -> EngineStatistics:
        return EngineStatistics(
            model_version=self._artifact.model_version,
            device=str(self._device),
            row_invariant=self.row_invariant,
            num_calls=self._num_calls,
            num_windows=self._num_windows,
            num_padded_rows=self._num_padded_rows,
            num_out_of_memory=self._num_out_of_memory,
            buckets=tuple(
                BucketStatistics(bucket, self._calls_by_bucket[bucket]) for bucket in self._buckets
            ),
        )

    def check_reference(self) -> None:
        """Runs the artifact's reference windows; blocks like ``infer``.

        Raises ConfigError when the largest absolute difference from the reference outputs is above
        the artifact's tolerance: this device does not compute this model.
        """
        reference = self._artifact.reference
        plan = self._plan(len(reference.windows))
        with self._turn:
            outputs = np.concatenate(self._run_plan(reference.windows, plan), axis=1)
        expected = np.concatenate([reference.features, reference.scores], axis=1)
        error = float(np.abs(outputs - expected).max())
        if not error <= self._artifact.tolerance:  # so that NaN fails too
            raise ConfigError(
                f"{self._artifact.model_version} on {self._device} is off its reference outputs by "
                f"{error:.3g}, more than its tolerance {self._artifact.tolerance:g}; use another "
                "model.device or save the artifact with a tolerance that it can keep"
            )

    def _plan(self, num_windows: int) -> tuple[int, ...]:
        """The buckets that hold so many rows at the least measured cost.

        On a CPU 130 rows are cheaper as 128 + 4 than padded to 256 (and 256 often as 128 twice), on
        a GPU they are not. Equal bits in every bucket make this a question of time alone.
        """
        largest = self._buckets[-1]
        if num_windows > largest:
            whole, rest = divmod(num_windows, largest)
            return self._plan(largest) * whole + self._plan(rest)
        if num_windows not in self._plans:
            padded = next(bucket for bucket in self._buckets if bucket >= num_windows)
            plans: list[tuple[int, ...]] = [(padded,)]
            if padded > self._buckets[0]:
                filled = self._buckets[self._buckets.index(padded) - 1]
                plans.append((filled, *self._plan(num_windows - filled)))
            self._plans[num_windows] = min(plans, key=self._plan_cost_s)
        return self._plans[num_windows]

    def _plan_cost_s(self, plan: Sequence[int]) -> float:
        return sum(self._cost_s[bucket] for bucket in plan)

    def _run_plan(
        self, windows: NDArray[np.float32], plan: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Features (B, F) and scores (B, S), float32. The only place that runs the model."""
        torch.set_num_threads(self._num_threads)  # OpenMP counts per calling thread
        if self._device.type == "cpu":
            return self._run_passes(windows, plan)
        with _ON_GPU:
            _allow_tf32(self.precision == "tf32")
            return self._run_passes(windows, plan)

    def _run_passes(
        self, windows: NDArray[np.float32], plan: Sequence[int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        config = self._artifact.config
        features = np.empty((len(windows), config.num_features), np.float32)
        scores = np.empty((len(windows), config.num_scores), np.float32)
        running: deque[tuple[Pass, slice]] = deque()

        def finish_first() -> None:
            one, rows = running.popleft()
            outputs = one.finish()
            features[rows] = outputs[:, : config.num_features]
            scores[rows] = outputs[:, config.num_features :]

        start = 0
        for number, bucket in enumerate(plan):
            rows = slice(start, min(start + bucket, len(windows)))
            passes = self._passes_of(bucket)
            chosen = passes[number % len(passes)]
            while any(one is chosen for one, _ in running):
                finish_first()
            chosen.begin(windows[rows])
            running.append((chosen, rows))
            start = rows.stop
        while running:
            finish_first()
        return features, scores

    def _passes_of(self, bucket: int) -> tuple[Pass, ...]:
        if bucket not in self._passes:
            if self._device.type == "cuda" and self._artifact.cuda_graphs:
                graphs = [
                    GraphPass(self._model, bucket, self._device, sleep=self._sleeps)
                    for _ in range(2)
                ]
                self._passes[bucket] = tuple(graphs)
            else:
                self._passes[bucket] = (EagerPass(self._model, bucket, self._device),)
        return self._passes[bucket]

    def _give_up(self, bucket: int) -> None:
        """Forgets a shape that the device has no memory for, and all larger ones.

        Raises TransientError if none is left.
        """
        self._num_out_of_memory += 1
        smaller = tuple(size for size in self._buckets if size < bucket)
        if not smaller:
            raise TransientError(
                f"{self._device} has no memory left for a batch of {bucket} windows; free some, or "
                "raise model.gpu_memory_fraction"
            )
        log.warning("engine_out_of_memory", bucket=bucket, buckets=list(smaller))
        self._leave_out_from(bucket)

    def _leave_out_from(self, bucket: int) -> None:
        """Uses smaller shapes alone from now on."""
        self._buckets = tuple(size for size in self._buckets if size < bucket)
        self._passes = {size: one for size, one in self._passes.items() if size < bucket}
        self._plans = {0: ()}
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _keep_equal_buckets(self) -> bool:
        """Leaves the buckets that give a row equal bits at every position; False if none does.

        The design promises bit-identical features after a restart, though micro-batches are then
        cut elsewhere. Kernels are chosen by shape and round differently, so nothing is assumed:
        each bucket runs the same probe rows at every position, among different neighbours.
        """
        probes = self._probe_windows()
        agreeing: dict[bytes, list[int]] = {}
        for bucket in self._buckets:
            try:
                bits, self._cost_s[bucket] = self._probe(bucket, probes)
            except torch.OutOfMemoryError:
                self._give_up(bucket)
                break
            if self._cost_s[bucket] > self._max_call_s and bucket > self._buckets[0]:
                self._leave_out_from(bucket)
                self._is_bounded = True
                break
            if bits is not None:
                agreeing.setdefault(bits, []).append(bucket)
        dropped: set[int] = set()
        if agreeing:
            # A GPU takes about as long for one row as for many: its largest shape serves all. A CPU
            # pays by the row: keep the most shapes, and of equally many the smallest.
            on_gpu = self._device.type == "cuda"
            groups = agreeing.values()
            kept = max(groups, key=max if on_gpu else lambda group: (len(group), -max(group)))
            dropped = set(self._buckets) - set(kept)
            self._buckets = tuple(kept)
            self._passes = {bucket: self._passes[bucket] for bucket in kept}
        if dropped or not agreeing:
            log.warning(
                "engine_rows_depend_on_batch",
                row_invariant=bool(agreeing),
                dropped_buckets=sorted(dropped),
                buckets=list(self._buckets),
                device=str(self._device),
            )
        return bool(agreeing)

    def _probe_windows(self) -> NDArray[np.float32]:
        """float32 (P, C, T): typical windows and, last, one of huge values."""
        artifact = self._artifact
        probes = typical_windows(artifact.config, artifact.normalisation, _NUM_PROBES, seed=1)
        probes[-1] = np.where(probes[-1] > artifact.normalisation.mean[:, None], _WILD, -_WILD)
        return probes

    def _probe(self, bucket: int, probes: NDArray[np.float32]) -> tuple[bytes | None, float]:
        """The probes' output bits if alike in every layout of this bucket, else None; its seconds.

        The time is the best of five, so that a noisy host matters less: it only weighs plans
        against each other.
        """
        rows = np.arange(bucket)
        layouts = [(rows + shift) % len(probes) for shift in range(len(probes))]
        layouts.append(rows[:1])  # alone, among zeros
        bits: dict[int, set[bytes]] = {}
        cost_s = float("inf")
        for layout in layouts:
            start_s = time.perf_counter()
            outputs = np.concatenate(self._run_plan(probes[layout], (bucket,)), axis=1)
            cost_s = min(cost_s, time.perf_counter() - start_s)
            for probe, output in zip(layout.tolist(), outputs, strict=True):
                bits.setdefault(probe, set()).add(output.tobytes())
        if any(len(seen) > 1 for seen in bits.values()):
            return None, cost_s
        return b"".join(next(iter(bits[probe])) for probe in sorted(bits)), cost_s


def load_engine(settings: ModelSettings, window: WindowSettings | None = None) -> Engine:
    """The engine that the settings ask for: ``settings.artifact``, else seeded weights.

    Pins the calling thread to ``settings.cpu_affinity``: call it on the engine's own.

    Args:
        window: what will feed it; the artifact is checked against it. None: the default.

    Raises ConfigError: see ``load_artifact``, ``Engine`` and ``pin_thread``; or no artifact for a
    channel set other than market50-v1.
    """
    pin_thread("model.cpu_affinity", settings.cpu_affinity)  # torch's threads inherit it
    window = window or WindowSettings()
    if settings.artifact is not None:
        artifact = load_artifact(
            settings.artifact, channels_version=window.channel_set, num_steps=window.num_steps
        )
    elif window.channel_set == MARKET50_V1:
        artifact = seeded_artifact(config=ModelConfig(num_steps=window.num_steps))
    else:
        raise ConfigError(
            f"there are no seeded weights for channel set {window.channel_set!r}; "
            "set model.artifact to a model made for it"
        )
    return build_engine(artifact, settings)


def build_engine(artifact: Artifact, settings: ModelSettings) -> Engine:
    """An engine for this artifact, placed as the settings say. Raises ConfigError."""
    return Engine(
        artifact,
        device=settings.device,
        num_threads=settings.num_threads,
        max_batch=settings.max_batch,
        max_call_s=settings.max_call_ms / 1000,
        gpu_memory_fraction=settings.gpu_memory_fraction,
        gpu_wait=settings.gpu_wait,
    )


def _candidate_buckets(max_batch: int) -> tuple[int, ...]:
    """Powers of two from 4, then ``max_batch`` itself. Below 4 it changes nothing: equal bits."""
    buckets = [SMALLEST_BUCKET]
    while 2 * buckets[-1] <= max_batch:
        buckets.append(2 * buckets[-1])
    return (*buckets, max_batch) if max_batch > buckets[-1] else tuple(buckets)


def resolve_device(device: Device) -> torch.device:
    """The device of that name here. Raises ConfigError if there is none."""
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError(
            "model.device is 'cuda', but torch sees no CUDA device; "
            "set model.device = 'auto' or mend the driver"
        )
    return torch.device("cuda" if device == "cuda" or (device == "auto" and has_cuda) else "cpu")


def _prefer_exact_arithmetic() -> None:
    """Process-wide: no autotuned kernels, deterministic ones where torch has them.

    For CUDA alone: a CPU has none of these choices, and the last call imports for seconds.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.backends.cudnn.benchmark = False
    # Filling costs time and changes nothing: no kernel here reads what it did not write.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)


def _allow_tf32(allowed: bool) -> None:
    """Process-wide, so said at every call: another engine may have said otherwise."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed
