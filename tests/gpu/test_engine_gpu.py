"""The engine on a GPU: every variant is still the model. ``pytest -m gpu``, where there is one."""

import functools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from inference.artifact import typical_windows
from inference.engine import Engine
from inference.model import ModelConfig, Precision
from inference.optimize import optimize
from inference.seeded import seeded_artifact
from schemas.errors import TransientError

pytestmark = [
    pytest.mark.gpu,
    # torch lays an LSTM's weights together in every precision but bf16 (2.15), and says so.
    pytest.mark.filterwarnings("ignore:RNN module weights are not part:UserWarning"),
]

ARTIFACT = seeded_artifact(config=ModelConfig(score_names=("up", "down")))
WINDOWS = typical_windows(ARTIFACT.config, ARTIFACT.normalisation, 700, seed=9)
SIZES = [1, 2, 3, 5, 17, 64, 65, 130, 256, 300, 511, 512, 513, 700]
MAX_ERROR: dict[Precision, float] = {"fp32": 1e-5, "tf32": 1e-3, "bf16": 0.02, "fp16": 2e-3}

each_variant = pytest.mark.parametrize(
    ("precision", "cuda_graphs"),
    [(precision, graphs) for precision in MAX_ERROR for graphs in (True, False)],
)


@functools.cache
def engine_of(precision: Precision, cuda_graphs: bool) -> Engine:
    variant = ARTIFACT.as_variant(precision=precision, cuda_graphs=cuda_graphs, tolerance=0.05)
    return Engine(variant, device="cuda", num_threads=4, max_batch=512)


def outputs_of(engine: Engine, windows: NDArray[np.float32]) -> NDArray[np.float32]:
    inference = engine.infer(windows)
    return np.concatenate([inference.features, inference.scores], axis=1)


@functools.cache
def exact() -> NDArray[np.float32]:
    return outputs_of(Engine(ARTIFACT, device="cpu"), WINDOWS)


@each_variant
def test_every_variant_is_within_its_error_of_the_cpu(
    precision: Precision, cuda_graphs: bool
) -> None:
    found = outputs_of(engine_of(precision, cuda_graphs), WINDOWS)
    assert np.abs(found - exact()).max() <= MAX_ERROR[precision]


def test_a_thread_that_sleeps_until_the_gpu_is_done_gets_the_same_bits() -> None:
    variant = ARTIFACT.as_variant(precision="fp16", cuda_graphs=True, tolerance=0.05)
    asleep = Engine(variant, device="cuda", max_batch=512, gpu_wait="sleep")
    expected = outputs_of(engine_of("fp16", True), WINDOWS)
    np.testing.assert_array_equal(outputs_of(asleep, WINDOWS), expected)


@each_variant
def test_bits_do_not_depend_on_the_batch_and_a_nan_stays_in_its_row(
    precision: Precision, cuda_graphs: bool
) -> None:
    engine = engine_of(precision, cuda_graphs)
    assert engine.row_invariant
    whole = outputs_of(engine, WINDOWS)
    random = np.random.default_rng(5)
    for num_windows in SIZES:
        first = int(random.integers(0, len(WINDOWS) - num_windows + 1))
        part = WINDOWS[first : first + num_windows].copy()
        np.testing.assert_array_equal(outputs_of(engine, part), whole[first : first + num_windows])
        spoilt = int(random.integers(0, num_windows))
        part[spoilt, 3, 7] = np.nan
        dirty = outputs_of(engine, part)
        others = np.arange(num_windows) != spoilt
        np.testing.assert_array_equal(
            dirty[others], whole[first : first + num_windows][others], err_msg=str(num_windows)
        )
        assert np.isnan(dirty[spoilt]).all()


def test_graphs_and_kernels_one_by_one_give_the_same_bits() -> None:
    graphs, eager = engine_of("fp16", True), engine_of("fp16", False)
    np.testing.assert_array_equal(outputs_of(graphs, WINDOWS), outputs_of(eager, WINDOWS))


def test_a_gpu_without_room_is_said_to_be_so() -> None:
    try:
        with pytest.raises(TransientError, match="no memory left for a batch of 4 windows"):
            Engine(ARTIFACT, device="cuda", max_batch=4096, gpu_memory_fraction=0.001)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_what_is_kept_is_within_the_error() -> None:
    found = optimize(ARTIFACT, device="cuda", num_threads=4, max_batch=512, max_error=0.01)
    assert [step.change for step in found.steps] == ["CUDA graphs", "TF32", "bf16", "fp16"]
    for step in found.steps:
        assert step.max_error is not None, f"{step.change} {step.why}"
        assert not step.kept or step.max_error <= 0.01
    engine = Engine(found.artifact, device="cuda", num_threads=4, max_batch=512)
    assert np.abs(outputs_of(engine, WINDOWS) - exact()).max() <= 0.01
