"""The model that runs before anyone has trained one: random weights, the same for everyone."""

import math
from pathlib import Path

import numpy as np
import torch

from inference.artifact import Artifact, save_artifact
from inference.model import CnnLstm, ModelConfig, Normalisation
from schemas.errors import ConfigError

MARKET50_V1 = "market50-v1"
_NAME = "cnn-lstm-seeded"
_MAX_BIAS = 0.1

# (number of channels, mean, scale) in the order of market50-v1: round figures of the size that
# liquid markets show, fitted to nothing. They only keep each channel within the network's reach.
_MARKET50_V1_CHANNELS: tuple[tuple[int, float, float], ...] = (
    (10, 0, 5),  # bid price offset from mid, bps
    (10, 2, 2),  # ln(1 + bid size)
    (10, 0, 5),  # ask price offset from mid, bps
    (10, 2, 2),  # ln(1 + ask size)
    (1, 0, 1),  # mid log-return, bps
    (1, 1, 2),  # spread, bps
    (1, 0, 1),  # micro-price offset from mid, bps
    (3, 0, 0.5),  # imbalance at 1, 5 and 10 levels, -1 to 1
    (1, 0, 2),  # signed ln(1 + last trade's size)
    (1, 0, 1),  # last trade's log-return, bps
    (1, 10, 4),  # ln(1 + microseconds since the previous event)
    (1, 2, 2),  # ln(1 + trades per second)
)

_CARD = """# {model_version}

**The weights of this model are random.** They come from seed {seed} and were never trained. Its
features carry no market meaning: they show that a pipeline runs, how fast, and that it gives the
same bits again. Nobody should trade on them.

| | |
| --- | --- |
| input | float32, {config.num_channels} channels x {config.num_steps} steps, `{channels_version}` |
| output | {config.num_features} features, {config.num_scores} scores |
| convolutions | {config.conv_channels}, kernel {config.kernel_size} |
| LSTM | {config.lstm_layers} layers of {config.lstm_hidden} |
| weights | uniform, numpy PCG64 seed {seed}; variance 2 / fan-in (convolutions), else 1 / fan-in |
| normalisation | round constants, fitted to nothing |
"""


def seeded_artifact(
    seed: int = 0,
    *,
    config: ModelConfig | None = None,
    channels_version: str = MARKET50_V1,
    path: Path | None = None,
) -> Artifact:
    """The artifact of a seed and sizes: equal arguments give equal bits on every machine.

    Args:
        channels_version: its number of channels must be the config's. Channel sets other than
            ``market50-v1`` are taken as they are: mean 0, scale 1.
        path: a folder to save it in; none: it stays in memory.

    Raises:
        ConfigError: the channel set does not have the config's number of channels, or the folder
            exists.
    """
    config = config or ModelConfig()
    normalisation = _normalisation(config, channels_version)
    model = CnnLstm(config, normalisation)
    _fill(model, seed)
    draft = Artifact.from_model(
        model, name=_NAME, version=str(seed), channels_version=channels_version, card=""
    )
    card = _CARD.format(
        model_version=draft.model_version,
        seed=seed,
        config=config,
        channels_version=channels_version,
    )
    artifact = draft.with_card(card)
    if path is not None:
        save_artifact(artifact, path)
    return artifact


def _normalisation(config: ModelConfig, channels_version: str) -> Normalisation:
    if channels_version != MARKET50_V1:
        return Normalisation(np.zeros(config.num_channels), np.ones(config.num_channels))
    counts = [count for count, _, _ in _MARKET50_V1_CHANNELS]
    if config.num_channels != sum(counts):
        raise ConfigError(
            f"channel set {MARKET50_V1} has {sum(counts)} channels, the model's sizes say "
            f"{config.num_channels}; set num_channels = {sum(counts)} or name another channel set"
        )
    means = np.repeat([mean for _, mean, _ in _MARKET50_V1_CHANNELS], counts)
    scales = np.repeat([scale for _, _, scale in _MARKET50_V1_CHANNELS], counts)
    return Normalisation(means, scales)


def _fill(model: CnnLstm, seed: int) -> None:
    """Numpy draws the weights: its streams are alike everywhere, torch's vary with its release."""
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                bound = _MAX_BIAS
            else:
                fan_in = math.prod(parameter.shape[1:])
                variance = (2 if name.startswith("conv") else 1) / fan_in
                bound = math.sqrt(3 * variance)  # of a uniform distribution
            values = random.uniform(-bound, bound, tuple(parameter.shape)).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))
