"""A window's bits are its own, whatever it is computed with; and the engine knows when not."""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from inference.artifact import typical_windows
from inference.engine import Engine, load_engine
from inference.model import CnnLstm, ModelConfig, Precision
from inference.passes import EagerPass
from inference.seeded import seeded_artifact
from schemas.errors import ConfigError, TransientError
from schemas.settings import ModelSettings, WindowSettings

DEFAULT = ModelConfig(score_names=("up", "down"))
TINY = ModelConfig(conv_channels=(16,), lstm_hidden=16)
MAX_BATCH = 32

Windows = NDArray[np.float32]


@functools.cache
def engine_of(config: ModelConfig, num_threads: int = 1, max_batch: int = MAX_BATCH) -> Engine:
    channels_version = "market50-v1" if config.num_channels == 50 else "test-v1"
    artifact = seeded_artifact(config=config, channels_version=channels_version)
    return Engine(artifact, device="cpu", num_threads=num_threads, max_batch=max_batch)


@functools.cache
def pool(config: ModelConfig) -> Windows:
    """Windows of every temper: random, constant, zero, huge, denormal, alternating."""
    random = np.random.default_rng(11)
    shape = (config.num_channels, config.num_steps)
    windows = [random.normal(0, 10.0 ** random.integers(-3, 3), shape) for _ in range(12)]
    windows += [np.full(shape, value) for value in (0.0, 1.0, -7.5, 1e-42, 3e38, -3e38)]
    windows.append(np.where(np.indices(shape).sum(axis=0) % 2, 1e30, -1e30))
    return np.array(windows, np.float32)


def bits_of(engine: Engine, windows: Windows) -> list[bytes]:
    """One row's features and scores each."""
    inference = engine.infer(windows)
    assert len(inference.features) == len(inference.scores) == len(windows)
    rows = zip(inference.features, inference.scores, strict=True)
    return [features.tobytes() + scores.tobytes() for features, scores in rows]


@functools.cache
def bits_alone(config: ModelConfig, num_threads: int, max_batch: int = MAX_BATCH) -> list[bytes]:
    engine = engine_of(config, num_threads, max_batch)
    return [bits_of(engine, window[None])[0] for window in pool(config)]


def test_calls_of_several_threads_take_turns() -> None:
    """They share the engine's buffers: side by side they would fail, or get each other's rows."""
    engine, expected = engine_of(TINY), bits_alone(TINY, 1)

    def ask(num_windows: int) -> None:
        for _ in range(300):
            assert bits_of(engine, pool(TINY)[:num_windows]) == expected[:num_windows]

    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(ask, num_windows) for num_windows in (1, 3, 7, 19)]:
            done.result()


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("config", [DEFAULT, TINY], ids=["default", "tiny"])
def test_the_usual_sizes_are_row_invariant(config: ModelConfig, num_threads: int) -> None:
    """Which buckets that costs is the processor's affair: an AMD EPYC keeps 4, a Xeon does not."""
    statistics = engine_of(config, num_threads).statistics()
    assert statistics.row_invariant
    assert {bucket.num_rows for bucket in statistics.buckets} <= {4, 8, 16, 32}


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("config", [DEFAULT, TINY], ids=["default", "tiny"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_window_s_bits_do_not_depend_on_its_batch(
    config: ModelConfig, num_threads: int, data: st.DataObject
) -> None:
    """Any batch, in any order, of any length, cut anywhere, gives what each window gives alone."""
    windows, alone = pool(config), bits_alone(config, num_threads)
    rows = data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=80), label="rows")
    engine = engine_of(config, num_threads)
    assert bits_of(engine, windows[rows]) == [alone[row] for row in rows]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_row_invariance_is_never_claimed_falsely(data: st.DataObject) -> None:
    """Odd sizes have kernels with tails that round otherwise; then the engine must say so."""
    size = st.integers(1, 40)
    config = ModelConfig(
        num_channels=data.draw(st.integers(1, 8), label="channels"),
        num_steps=data.draw(st.integers(1, 12), label="steps"),
        conv_channels=tuple(data.draw(st.lists(size, min_size=1, max_size=2), label="conv")),
        lstm_hidden=data.draw(size, label="hidden"),
        lstm_layers=data.draw(st.integers(1, 2), label="layers"),
        num_features=data.draw(size, label="features"),
        score_names=("a", "b", "c")[: data.draw(st.integers(0, 3), label="scores")],
        score_activation=data.draw(st.sampled_from(["sigmoid", "softmax"]), label="activation"),
    )
    max_batch = data.draw(st.sampled_from([1, 5, 16, 37]), label="max_batch")
    engine = engine_of(config, 1, max_batch)
    if not engine.statistics().row_invariant:
        return
    windows, alone = pool(config), bits_alone(config, 1, max_batch)
    rows = data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=60), label="rows")
    assert bits_of(engine, windows[rows]) == [alone[row] for row in rows]


@pytest.mark.parametrize("num_windows", [0, 1, 4, 5, 31, 32, 33, 200])
def test_every_window_is_computed_once_and_counted(num_windows: int) -> None:
    engine = engine_of(TINY)
    before = engine.statistics()
    windows = np.random.default_rng(num_windows).normal(size=(num_windows, 50, 60))
    inference = engine.infer(windows.astype(np.float32))
    assert inference.features.shape == (num_windows, 64)
    assert inference.scores.shape == (num_windows, 0)
    assert inference.features.dtype == inference.scores.dtype == np.float32
    assert inference.model_version == engine.describe().model_version
    after = engine.statistics()
    assert after.num_calls == before.num_calls + 1
    assert after.num_windows == before.num_windows + num_windows
    computed = sum(
        new.num_rows * (new.num_calls - old.num_calls)
        for new, old in zip(after.buckets, before.buckets, strict=True)
    )
    assert computed == num_windows + after.num_padded_rows - before.num_padded_rows
    assert computed - num_windows < MAX_BATCH


@functools.cache
def variant_of(precision: Precision) -> Engine:
    variant = seeded_artifact(config=DEFAULT).as_variant(precision=precision, tolerance=0.05)
    return Engine(variant, device="cpu", max_batch=MAX_BATCH)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_nan_stays_in_its_own_row_and_the_rest_is_the_model_s(
    precision: Precision, data: st.DataObject
) -> None:
    """Whatever the variant and the bucket."""
    engine = variant_of(precision)
    num_windows = data.draw(st.integers(1, 70), label="windows")
    spoilt = data.draw(st.integers(0, num_windows - 1), label="spoilt")
    artifact = seeded_artifact(config=DEFAULT)
    windows = typical_windows(DEFAULT, artifact.normalisation, num_windows, seed=num_windows)
    clean = engine.infer(windows)
    dirty = windows.copy()
    dirty[spoilt, 7, 3] = np.nan
    found = engine.infer(dirty)
    others = np.arange(num_windows) != spoilt
    np.testing.assert_array_equal(found.features[others], clean.features[others])
    assert np.isnan(found.features[spoilt]).all()
    exact = engine_of(DEFAULT).infer(windows)
    limit = 1e-5 if precision == "fp32" else 0.05
    assert np.abs(clean.features - exact.features).max() <= limit
    assert np.abs(clean.scores - exact.scores).max() <= limit


def test_a_batch_that_memory_is_short_for_runs_in_smaller_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine(seeded_artifact(config=TINY), device="cpu", max_batch=32)
    windows = np.random.default_rng(3).normal(size=(70, 50, 60)).astype(np.float32)
    expected = engine.infer(windows)
    begin = EagerPass.begin

    def short(self: EagerPass, rows: Windows) -> None:
        if len(rows) > 8:
            raise torch.OutOfMemoryError("planted")
        begin(self, rows)

    monkeypatch.setattr(EagerPass, "begin", short)
    found = engine.infer(windows)
    np.testing.assert_array_equal(found.features, expected.features)
    statistics = engine.statistics()
    assert statistics.num_out_of_memory == 2, "32, then 16"
    assert [bucket.num_rows for bucket in statistics.buckets] == [4, 8]
    assert statistics.num_windows == 140, "no window is counted twice"

    def none(self: EagerPass, rows: Windows) -> None:
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(EagerPass, "begin", none)
    with pytest.raises(TransientError, match="no memory left for a batch of 4 windows"):
        engine.infer(windows)


def test_windows_that_may_not_be_written_are_read() -> None:
    """Serve hands over memory that others share."""
    windows = pool(TINY)[:4].copy()
    windows.flags.writeable = False
    np.testing.assert_array_equal(
        engine_of(TINY).infer(windows).features, engine_of(TINY).infer(windows.copy()).features
    )


def test_the_engine_answers_as_the_model_does() -> None:
    engine, artifact = engine_of(DEFAULT), seeded_artifact(config=DEFAULT)
    windows = pool(DEFAULT)
    inference = engine.infer(windows)
    with torch.inference_mode():
        features, scores = artifact.build_model()(torch.from_numpy(windows))
    np.testing.assert_allclose(inference.features, features.numpy(), rtol=0, atol=1e-5)
    np.testing.assert_allclose(inference.scores, scores.numpy(), rtol=0, atol=1e-5)


def test_results_stay_when_the_engine_runs_again() -> None:
    """The staging memory is reused; what a caller holds is not."""
    engine, windows = engine_of(TINY), pool(TINY)
    first = engine.infer(windows[:4])
    copy = first.features.copy()
    engine.infer(windows[4:8])
    np.testing.assert_array_equal(first.features, copy)


@pytest.mark.parametrize(
    ("windows", "text"),
    [
        (np.zeros((1, 60, 50), np.float32), r"50 channels, 60 steps\), not \(1, 60, 50\)"),
        (np.zeros((50, 60), np.float32), r"not \(50, 60\)"),
        (np.zeros((1, 50, 60)), "float32, not float64"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(windows: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        engine_of(TINY).infer(windows)


def skewed(skew: Callable[[int], torch.Tensor | float]) -> Callable[..., Any]:
    """A forward pass exact on every processor, but off by ``skew(batch size)``: a fault."""

    def forward(self: CnnLstm, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = windows.flatten(1)[:, : self.config.num_features].clamp(-1, 1)
        return features + skew(len(windows)), features[:, :0]

    return forward


@pytest.mark.parametrize(
    ("skew", "row_invariant", "buckets"),
    [
        (lambda size: 0.0, True, [4, 8, 16, 32]),
        (lambda size: 1e-6 * (size == 8), True, [4, 16, 32]),
        (lambda size: 1e-6 * (size == 4), True, [8, 16, 32]),
        (lambda size: 1e-6 * (size >= 16), True, [4, 8]),
        (lambda size: 1e-7 * size, True, [4]),
        (lambda size: 1e-6 * (torch.arange(size) == size - 1)[:, None], False, [4, 8, 16, 32]),
    ],
    ids=["none", "one", "smallest", "half", "each", "position"],
)
def test_buckets_that_round_otherwise_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
    skew: Callable[[int], torch.Tensor | float],
    row_invariant: bool,
    buckets: list[int],
) -> None:
    monkeypatch.setattr(CnnLstm, "forward", skewed(skew))
    artifact = seeded_artifact(config=TINY)
    statistics = Engine(artifact, device="cpu", max_batch=32).statistics()
    assert statistics.row_invariant is row_invariant
    assert [bucket.num_rows for bucket in statistics.buckets] == buckets


def test_a_device_that_computes_another_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CnnLstm, "forward", skewed(lambda size: 0.0))
    artifact = seeded_artifact(config=TINY)
    monkeypatch.setattr(CnnLstm, "forward", skewed(lambda size: 2e-3))
    with pytest.raises(ConfigError, match=r"off its reference outputs by 0\.002"):
        Engine(artifact, device="cpu", max_batch=4)


def test_a_model_that_answers_nan_is_refused() -> None:
    artifact = seeded_artifact(config=TINY)
    poisoned = {**artifact.weights, "head.bias": torch.full((64,), float("nan"))}
    with pytest.raises(ConfigError, match="off its reference outputs by nan"):
        Engine(dataclasses.replace(artifact, weights=poisoned), device="cpu", max_batch=4)


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"torch sees no CUDA device; set model\.device = 'auto'"):
        Engine(seeded_artifact(config=TINY), device="cuda")


def test_settings_choose_the_model(tmp_path: Path) -> None:
    seeded_artifact(7, config=TINY, path=tmp_path / "model")
    brought = load_engine(ModelSettings(artifact=tmp_path / "model", max_batch=4))
    assert brought.describe().model_version.startswith("cnn-lstm-seeded@7-")
    seeded = load_engine(ModelSettings(max_batch=4), WindowSettings(num_steps=20))
    assert seeded.describe().model_version.startswith("cnn-lstm-seeded@0-")
    assert seeded.describe().num_steps == 20
    with pytest.raises(ConfigError, match="windows of 60 steps, not 20"):
        load_engine(ModelSettings(artifact=tmp_path / "model"), WindowSettings(num_steps=20))
    with pytest.raises(ConfigError, match="no seeded weights for channel set 'mine-v1'"):
        load_engine(ModelSettings(), WindowSettings(channel_set="mine-v1"))


# The ceiling.


def test_a_bucket_that_takes_too_long_is_not_used_and_callers_are_told() -> None:
    artifact = seeded_artifact(
        config=ModelConfig(conv_channels=(4,), lstm_hidden=16, lstm_layers=1, num_features=8)
    )
    free = Engine(artifact, device="cpu", max_batch=32)
    assert free.describe().max_batch is None, "nothing larger was tried"
    bound = Engine(artifact, device="cpu", max_batch=32, max_call_s=1e-9)
    assert [one.num_rows for one in bound.statistics().buckets] == [4]
    assert bound.describe().max_batch == 4
    windows = np.random.default_rng(0).normal(size=(11, 50, 60)).astype(np.float32)
    assert bound.infer(windows).features.tobytes() == free.infer(windows).features.tobytes()
