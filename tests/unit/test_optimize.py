"""Variants: kept only where they are still the model and faster; what is kept is what is saved."""

from pathlib import Path

import numpy as np
import pytest
import torch

import inference.optimize
from inference.artifact import load_artifact, save_artifact
from inference.bench import compare_calls, time_calls
from inference.engine import Engine
from inference.model import CnnLstm, ModelConfig
from inference.optimize import Optimized, Step, optimize
from inference.seeded import seeded_artifact
from schemas.errors import ConfigError

TINY = ModelConfig(conv_channels=(16,), lstm_hidden=16, score_names=("up",))
ARTIFACT = seeded_artifact(config=TINY)


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """How many times faster each candidate is, instead of a stopwatch; 1 unless it is set."""
    gains: dict[str, float] = {}

    def compared(
        engines: list[Engine], artifact: object, num_windows: int, **_: object
    ) -> list[float]:
        return [1.0, 1.0 / gains.get(engines[1].precision, 1.0)]

    monkeypatch.setattr(inference.optimize, "compare_calls", compared)
    return gains


def tried(**options: float) -> Optimized:
    return optimize(ARTIFACT, device="cpu", max_batch=8, **options)  # type: ignore[arg-type]


def test_a_faster_variant_within_the_error_is_kept(speed: dict[str, float]) -> None:
    speed["bf16"] = 2.0
    found = tried(max_error=0.05)
    (step,) = found.steps
    assert (step.change, step.kept, step.gain) == ("bf16", True, pytest.approx(2.0))
    assert step.max_error is not None
    assert 0 < step.max_error <= 0.05
    assert found.artifact.precision == "bf16"
    assert found.artifact.tolerance == 0.05
    assert found.artifact.model_version != ARTIFACT.model_version, "its features differ"
    assert found.artifact.reference is ARTIFACT.reference, "it is held to the fp32 outputs"


def test_a_variant_that_is_no_faster_is_not_kept(speed: dict[str, float]) -> None:
    speed["bf16"] = 1.01
    found = tried(max_error=0.05)
    assert [(step.kept, step.why) for step in found.steps] == [(False, "no faster (1.01 times)")]
    assert found.artifact.model_version == ARTIFACT.model_version
    assert found.artifact.tolerance == ARTIFACT.tolerance


def test_a_variant_beyond_the_error_is_not_kept_however_fast(speed: dict[str, float]) -> None:
    speed["bf16"] = 100.0
    (step,) = tried(max_error=1e-7).steps
    assert not step.kept
    assert step.gain is None
    assert "off its reference outputs" in step.why or "outputs are off by" in step.why


def test_pruning_sets_the_smallest_weights_to_zero(speed: dict[str, float]) -> None:
    speed["fp32"] = 1.5
    found = tried(max_error=10.0, prune_amount=0.25)
    assert [step.kept for step in found.steps] == [True, False]
    weight = found.artifact.weights["conv.0.weight"]
    before = ARTIFACT.weights["conv.0.weight"]
    gone = weight == 0
    assert gone.double().mean().item() == pytest.approx(0.25, abs=0.01)
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(weight[~gone], before[~gone])
    assert set(found.artifact.weights) == set(ARTIFACT.weights)


def test_every_step_is_told_when_it_is_decided(speed: dict[str, float]) -> None:
    told: list[Step] = []
    found = optimize(ARTIFACT, device="cpu", max_batch=8, prune_amount=0.5, on_step=told.append)
    assert tuple(told) == found.steps
    assert len(told) == 2


def test_a_variant_is_not_optimised_again() -> None:
    with pytest.raises(ConfigError, match="is a bf16 variant already; optimise the fp32 artifact"):
        optimize(ARTIFACT.as_variant(precision="bf16"), device="cpu")


def test_a_variant_survives_its_folder(tmp_path: Path) -> None:
    variant = ARTIFACT.as_variant(precision="bf16", cuda_graphs=False, tolerance=0.05)
    save_artifact(variant, tmp_path / "model")
    loaded = load_artifact(tmp_path / "model")
    assert (loaded.precision, loaded.cuda_graphs, loaded.tolerance) == ("bf16", False, 0.05)
    assert loaded.model_version == variant.model_version
    engine = Engine(loaded, device="cpu", max_batch=8)
    assert engine.describe().model_version == variant.model_version


def test_only_arithmetic_makes_another_version() -> None:
    assert ARTIFACT.as_variant(cuda_graphs=False).model_version == ARTIFACT.model_version
    assert ARTIFACT.as_variant(tolerance=1.0).model_version == ARTIFACT.model_version
    assert ARTIFACT.as_variant(precision="tf32").model_version != ARTIFACT.model_version


def test_normalisation_and_outputs_stay_float32() -> None:
    """A raw value may be far beyond what 16 bits can tell apart; normalised it is small."""
    model = CnnLstm(TINY, ARTIFACT.normalisation).eval().set_precision("bf16")
    assert model.conv[0].weight.dtype == torch.bfloat16
    windows = torch.randn(4, 50, 60) + 70_001.0
    centred = CnnLstm(TINY, type(ARTIFACT.normalisation)(np.full(50, 70_001.0), np.ones(50)))
    centred.load_state_dict(ARTIFACT.weights)
    with torch.inference_mode():
        exact = centred.eval()(windows)
        rounded = centred.set_precision("bf16")(windows)
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32
        assert (one - other).abs().max() < 0.05


def test_timings_count_what_they_say() -> None:
    engine = Engine(ARTIFACT, device="cpu", max_batch=8)
    before = engine.statistics().num_calls
    timing = time_calls(engine, ARTIFACT, 3, seconds=0.0)
    assert timing.num_calls == 5
    assert engine.statistics().num_calls == before + 3 + 5
    assert 0 < timing.p50_ms <= timing.p99_ms
    assert timing.windows_per_s == pytest.approx(3 / (timing.p50_ms / 1000), rel=0.01)
    pair = compare_calls([engine, engine], ARTIFACT, 2, rounds=4)
    assert len(pair) == 2
    assert min(pair) > 0
