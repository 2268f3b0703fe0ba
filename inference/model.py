"""The network: a normalised window in, a feature vector and named scores out."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
_DTYPES: Mapping[Precision, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


class ModelConfig(BaseModel):
    """The sizes of one CNN+LSTM. They are part of its artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_channels: int = Field(50, ge=1, le=4096)
    num_steps: int = Field(60, ge=1, le=4096)
    conv_channels: tuple[int, ...] = Field((64, 128), min_length=1, max_length=16)
    kernel_size: int = Field(3, ge=1, le=63, description="Odd, so that every step is kept.")
    lstm_hidden: int = Field(128, ge=1, le=4096)
    lstm_layers: int = Field(2, ge=1, le=16)
    num_features: int = Field(64, ge=1, le=65_536)
    score_names: tuple[str, ...] = ()
    score_activation: Literal["sigmoid", "softmax"] = "sigmoid"

    @field_validator("conv_channels")
    @classmethod
    def _positive(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if min(sizes) < 1:
            raise ValueError(f"every convolution needs at least 1 channel, not {min(sizes)}")
        return sizes

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        if len(set(self.score_names)) < len(self.score_names):
            raise ValueError(f"two scores have the same name: {', '.join(self.score_names)}")
        return self

    @property
    def num_scores(self) -> int:
        return len(self.score_names)


class Normalisation:
    """What makes a raw channel fit for the network: ``clip((x - mean) / scale, -clip, clip)``.

    Attributes:
        mean: float32, shape (C,), in the channel's own unit.
        scale: float32, shape (C,), the same unit, all positive.
        clip: in scales. It keeps one wild value from saturating every gate of the LSTM.

    Raises ValueError for shapes or values that cannot be.
    """

    __slots__ = ("clip", "mean", "scale")

    def __init__(self, mean: ArrayLike, scale: ArrayLike, clip: float = 10.0) -> None:
        self.mean: NDArray[np.float32] = np.array(mean, np.float32)
        self.scale: NDArray[np.float32] = np.array(scale, np.float32)
        self.clip = float(clip)
        if self.mean.ndim != 1 or self.mean.shape != self.scale.shape:
            raise ValueError(
                "mean and scale must hold one value per channel, "
                f"not shapes {self.mean.shape} and {self.scale.shape}"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.scale).all()):
            raise ValueError("mean and scale must be finite")
        if not (self.scale > 0).all():
            raise ValueError("scale must be positive in every channel")
        if not 0 < self.clip < float("inf"):
            raise ValueError(f"clip must be positive and finite, not {clip}")
        self.mean.flags.writeable = self.scale.flags.writeable = False


class CnnLstm(nn.Module):
    """Convolutions over time, an LSTM over their output, a linear head on its last step.

    A window lies wholly in the past, so the convolutions look both ways (padding ``same``): no step
    of it is hidden from another. Normalisation is a buffer outside the state dict: the artifact's
    config holds it, once.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, config: ModelConfig, normalisation: Normalisation) -> None:
        super().__init__()
        if len(normalisation.mean) != config.num_channels:
            raise ValueError(
                f"normalisation covers {len(normalisation.mean)} channels, "
                f"the model has {config.num_channels}"
            )
        self.config = config
        self.clip = normalisation.clip
        for name in ("mean", "scale"):
            column = torch.tensor(getattr(normalisation, name)).reshape(-1, 1)  # (C, 1): over steps
            self.register_buffer(name, column, persistent=False)
        layers: list[nn.Module] = []
        num_in = config.num_channels
        for num_out in config.conv_channels:
            layers += [nn.Conv1d(num_in, num_out, config.kernel_size, padding="same"), nn.ReLU()]
            num_in = num_out
        self.conv = nn.Sequential(*layers)
        self.lstm = nn.LSTM(num_in, config.lstm_hidden, config.lstm_layers, batch_first=True)
        # One product for both: a head of few outputs gets kernels of its own, that round otherwise.
        self.head = nn.Linear(config.lstm_hidden, config.num_features + config.num_scores)

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Takes float32 (B, C, T), oldest step first; gives features (B, F) and scores (B, S).

        Raises ValueError for another shape or dtype.
        """
        check_windows(self.config, tuple(windows.shape), str(windows.dtype).removeprefix("torch."))
        normalised = ((windows - self.mean) / self.scale).clamp(-self.clip, self.clip)
        steps = self.conv(normalised.to(self.head.weight.dtype)).transpose(1, 2)  # (B, T, conv)
        hidden, _ = self.lstm(steps)
        outputs = self.head(hidden[:, -1]).float()
        features, logits = outputs.tensor_split((self.config.num_features,), dim=1)
        return features, self._activate(logits)

    def set_precision(self, precision: Precision) -> Self:
        """Has the layers compute in this precision; what goes in and comes out stays float32.

        ``tf32`` is float32 here: it is a switch of the process, which ``Engine`` sets.
        """
        for layers in (self.conv, self.lstm, self.head):
            layers.to(_DTYPES[precision])
        self.lstm.flatten_parameters()
        return self

    def _activate(self, logits: Tensor) -> Tensor:
        if self.config.score_activation == "softmax":
            return logits.softmax(dim=-1)
        # A sigmoid is the softmax of (x, 0). Torch's own runs over the flat batch, whose last few
        # values take another code path and round otherwise; a softmax treats each row alike.
        pairs = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
        return pairs.softmax(dim=-1)[..., 0]


def check_windows(config: ModelConfig, shape: tuple[int, ...], dtype: str) -> None:
    """Raises ValueError unless an array of that shape and dtype is a batch of windows."""
    expected = (config.num_channels, config.num_steps)
    if len(shape) != 3 or shape[1:] != expected:
        raise ValueError(
            f"windows must have shape (batch, {expected[0]} channels, {expected[1]} steps), "
            f"not {shape}"
        )
    if dtype != "float32":
        raise ValueError(f"windows must be float32, not {dtype}")
