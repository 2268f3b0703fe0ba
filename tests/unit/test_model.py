"""The network against a second writing of it in plain numpy, and the sizes it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from inference.model import CnnLstm, ModelConfig, Normalisation
from inference.seeded import seeded_artifact
from schemas.errors import ConfigError

SMALL = ModelConfig(
    num_channels=3,
    num_steps=7,
    conv_channels=(4, 5),
    lstm_hidden=6,
    lstm_layers=2,
    num_features=8,
    score_names=("up", "down"),
)
Floats = NDArray[np.float64]


def sigmoid(x: Floats) -> Floats:
    return 1 / (1 + np.exp(-x))


def recomputed(model: CnnLstm, window: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """Features and score logits of one window (C, T), float64, straight from the definitions.

    LSTM as in Hochreiter and Schmidhuber with forget gates; torch stacks the gates i, f, g, o.
    """
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    mean, scale = model.mean.double().numpy(), model.scale.double().numpy()
    steps = np.clip((window - mean) / scale, -model.clip, model.clip)
    for layer in range(len(model.config.conv_channels)):
        kernel, bias = weights[f"conv.{2 * layer}.weight"], weights[f"conv.{2 * layer}.bias"]
        reach = model.config.kernel_size // 2
        padded = np.pad(steps, ((0, 0), (reach, reach)))
        steps = np.stack(
            [
                np.tensordot(kernel, padded[:, t : t + model.config.kernel_size], 2) + bias
                for t in range(steps.shape[1])
            ],
            axis=1,
        )
        steps = np.maximum(steps, 0)
    sequence = steps.T
    for layer in range(model.config.lstm_layers):
        w_x, w_h, b_x, b_h = (
            weights[f"lstm.{kind}_l{layer}"]
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        hidden = cell = np.zeros(model.config.lstm_hidden)
        outputs = []
        for x in sequence:
            i, f, g, o = np.split(w_x @ x + b_x + w_h @ hidden + b_h, 4)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            hidden = sigmoid(o) * np.tanh(cell)
            outputs.append(hidden)
        sequence = np.array(outputs)
    outputs = weights["head.weight"] @ sequence[-1] + weights["head.bias"]
    return outputs[: model.config.num_features], outputs[model.config.num_features :]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_features_and_scores_equal_a_recomputation_in_numpy(activation: Any) -> None:
    config = SMALL.model_copy(update={"score_activation": activation})
    weights = seeded_artifact(3, config=config, channels_version="test").weights
    model = CnnLstm(config, Normalisation([1, -2, 0.5], [2, 0.5, 3], clip=2.5)).eval()
    model.load_state_dict(weights)
    windows = np.random.default_rng(0).normal(0, 4, (5, 3, 7)).astype(np.float32)
    with torch.inference_mode():
        features, scores = model(torch.from_numpy(windows))
    assert (features.dtype, scores.dtype) == (torch.float32, torch.float32)
    assert (features.shape, scores.shape) == ((5, 8), (5, 2))
    for window, feature, score in zip(windows, features.numpy(), scores.numpy(), strict=True):
        expected, logits = recomputed(model, window)
        np.testing.assert_allclose(feature, expected, rtol=0, atol=1e-5)
        powers = np.exp(logits)
        wanted = powers / powers.sum() if activation == "softmax" else sigmoid(logits)
        np.testing.assert_allclose(score, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_scores", [1, 2, 3, 5, 17])
def test_a_score_s_bits_do_not_depend_on_its_place(num_scores: int) -> None:
    """A sigmoid over the flat batch rounds its last few values otherwise, though seldom.

    The engine's few probes would miss that, so the activation itself must treat each row alike.
    """
    config = SMALL.model_copy(update={"score_names": tuple(map(str, range(num_scores)))})
    model = CnnLstm(config, Normalisation([0] * 3, [1] * 3))
    noise = np.random.default_rng(num_scores).normal(0, 3, (1000, num_scores)).astype(np.float32)
    logits = torch.from_numpy(noise)
    together = model._activate(logits)
    for size in (1, 3, 4, 33):
        apart = torch.cat([model._activate(part) for part in torch.split(logits, size)])
        assert torch.equal(apart, together)


def test_the_default_sizes_are_the_design_s() -> None:
    model = seeded_artifact().build_model()
    with torch.inference_mode():
        features, scores = model(torch.zeros(2, 50, 60))
    assert (features.shape, scores.shape) == ((2, 64), (2, 0))
    assert not model.training


def test_a_wild_value_counts_as_the_clip() -> None:
    model = CnnLstm(SMALL, Normalisation([0] * 3, [0.5] * 3, clip=10)).eval()
    wild, clipped = torch.full((1, 3, 7), 3e38), torch.full((1, 3, 7), 5.0)
    with torch.inference_mode():
        assert torch.equal(model(wild)[0], model(clipped)[0])


@pytest.mark.parametrize(
    ("windows", "text"),
    [
        (torch.zeros(2, 50, 60), r"\(batch, 3 channels, 7 steps\), not \(2, 50, 60\)"),
        (torch.zeros(3, 7), r"not \(3, 7\)"),
        (torch.zeros(1, 7, 3), r"not \(1, 7, 3\)"),
        (torch.zeros(1, 3, 7, dtype=torch.float64), "must be float32, not float64"),
    ],
)
def test_other_shapes_and_dtypes_are_refused(windows: torch.Tensor, text: str) -> None:
    model = CnnLstm(SMALL, Normalisation([0] * 3, [1] * 3))
    with pytest.raises(ValueError, match=text):
        model(windows)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, not 4"),
        ({"conv_channels": ()}, "conv_channels"),
        ({"conv_channels": (8, 0)}, "at least 1 channel, not 0"),
        ({"lstm_hidden": 0}, "lstm_hidden"),
        ({"score_names": ("up", "up")}, "two scores have the same name"),
        ({"hidden": 3}, "hidden"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelConfig(**sizes)


@pytest.mark.parametrize(
    ("mean", "scale", "clip", "text"),
    [
        ([0, 0], [1], 10, "one value per channel"),
        ([0], [0], 10, "scale must be positive"),
        ([float("nan")], [1], 10, "must be finite"),
        ([0], [1], 0, "clip must be positive"),
        ([0], [1], float("inf"), "clip must be positive and finite"),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(
    mean: list[float], scale: list[float], clip: float, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        Normalisation(mean, scale, clip)


def test_a_model_and_its_normalisation_have_the_same_channels() -> None:
    with pytest.raises(ValueError, match="covers 2 channels, the model has 3"):
        CnnLstm(SMALL, Normalisation([0, 0], [1, 1]))


def test_a_seed_names_its_weights() -> None:
    """A change of the default weights, or of how numpy draws them, must not go unseen."""
    first, again, other = seeded_artifact(0), seeded_artifact(0), seeded_artifact(1)
    assert first.model_version == again.model_version == "cnn-lstm-seeded@0-698241df"
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert other.model_version.startswith("cnn-lstm-seeded@1-")
    assert other.model_version.removeprefix("cnn-lstm-seeded@1-") != "698241df"
    assert "random" in first.card
    assert "no market meaning" in first.card


def test_seeded_features_tell_windows_apart() -> None:
    """Random weights that saturate or vanish would hide every fault upstream."""
    features = seeded_artifact().reference.features
    assert np.isfinite(features).all()
    assert features.std(axis=0).min() > 1e-3


def test_market50_v1_has_fifty_channels() -> None:
    with pytest.raises(ConfigError, match=r"market50-v1 has 50 channels.*say 3"):
        seeded_artifact(config=SMALL)
