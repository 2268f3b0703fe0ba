"""The network: a window in, a feature vector and named scores out. Ours, or the user's own."""

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator
from torch import Tensor, nn

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
_DTYPES: Mapping[Precision, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)


CNN_LSTM = "cnn_lstm"
DEEPLOB = "deeplob"
EXPORTED = "exported"


class ModelConfig(BaseModel):
    """What a network reads and gives, and its own sizes. They are part of its artifact.

    ``conv_channels`` to ``lstm_layers`` are the CNN+LSTM's; DeepLOB's sizes are those published;
    a user's own architecture has ``options``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str = Field(
        CNN_LSTM,
        pattern=rf"^({CNN_LSTM}|{DEEPLOB}|{EXPORTED}|[\w.]+:\w+)$",
        description="`cnn_lstm`, `deeplob`, `package.module:Class` of an `nn.Module`, `exported`.",
    )
    options: dict[str, JsonValue] = Field({}, description="Of that class's constructor, by name.")
    num_channels: int = Field(50, ge=1, le=4096)
    num_steps: int = Field(60, ge=1, le=4096)
    conv_channels: tuple[int, ...] = Field((64, 128), min_length=1, max_length=16)
    kernel_size: int = Field(3, ge=1, le=63, description="Odd, so that every step is kept.")
    lstm_hidden: int = Field(128, ge=1, le=4096)
    lstm_layers: int = Field(2, ge=1, le=16)
    num_features: int = Field(64, ge=1, le=65_536)
    score_names: tuple[str, ...] = ()
    score_activation: Literal["sigmoid", "softmax"] = "sigmoid"
    score_groups: int = Field(
        1, ge=1, description="A softmax is over each of so many groups of scores, alike in size."
    )

    @field_validator("conv_channels")
    @classmethod
    def _positive(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if min(sizes) < 1:
            raise ValueError(f"every convolution needs at least 1 channel, not {min(sizes)}")
        return sizes

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.options and self.architecture in (CNN_LSTM, DEEPLOB, EXPORTED):
            raise ValueError(f"options are another architecture's; {self.architecture} has none")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, not {self.kernel_size}")
        if len(set(self.score_names)) < len(self.score_names):
            raise ValueError(f"two scores have the same name: {', '.join(self.score_names)}")
        if len(self.score_names) % self.score_groups:
            raise ValueError(
                f"{len(self.score_names)} scores do not make {self.score_groups} groups alike"
            )
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())  # a dict among the fields has none of its own

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


class Network(nn.Module):
    """What every architecture shares: normalisation before it, activation of the scores behind.

    Normalisation is a buffer outside the state dict: the artifact's config holds it, once.
    """

    mean: Tensor
    scale: Tensor
    program: bytes | None = None

    def __init__(self, config: ModelConfig, normalisation: Normalisation) -> None:
        super().__init__()
        if len(normalisation.mean) != config.num_channels:
            raise ValueError(
                f"normalisation covers {len(normalisation.mean)} channels, "
                f"the model has {config.num_channels}"
            )
        self.config = config
        self.clip = normalisation.clip
        self._dtype = torch.float32
        for name in ("mean", "scale"):
            column = torch.tensor(getattr(normalisation, name)).reshape(-1, 1)  # (C, 1): over steps
            self.register_buffer(name, column, persistent=False)

    def encode(self, normalised: Tensor) -> Tensor:
        """Takes (B, C, T) in the layers' precision; gives (B, F + S), scores before activation."""
        raise NotImplementedError

    def forward(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Takes float32 (B, C, T), oldest step first; gives features (B, F) and scores (B, S).

        Raises ValueError for another shape or dtype.
        """
        check_windows(self.config, tuple(windows.shape), str(windows.dtype).removeprefix("torch."))
        features, logits = self.logits(windows)
        return features, self._activate(logits)

    def logits(self, windows: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, F), and the scores before their activation (B, S): what training asks."""
        normalised = ((windows - self.mean) / self.scale).clamp(-self.clip, self.clip)
        outputs = self.encode(normalised.to(self._dtype)).float()
        features, logits = outputs.tensor_split((self.config.num_features,), dim=1)
        return features, logits

    def set_precision(self, precision: Precision) -> Self:
        """Has the layers compute in this precision; what goes in and comes out stays float32.

        ``tf32`` is float32 here: it is a switch of the process, which ``Engine`` sets.
        """
        self._dtype = _DTYPES[precision]
        for layers in self.children():
            layers.to(self._dtype)
        for layer in self.modules():
            if isinstance(layer, nn.RNNBase):
                layer.flatten_parameters()
        return self

    def _activate(self, logits: Tensor) -> Tensor:
        if self.config.score_activation == "softmax":
            groups = logits.reshape(len(logits), self.config.score_groups, -1)
            return groups.softmax(dim=-1).reshape(logits.shape)
        # A sigmoid is the softmax of (x, 0). Torch's own runs over the flat batch, whose last few
        # values take another code path and round otherwise; a softmax treats each row alike.
        pairs = torch.stack([logits, torch.zeros_like(logits)], dim=-1)
        return pairs.softmax(dim=-1)[..., 0]


class CnnLstm(Network):
    """Convolutions over time, an LSTM over their output, a linear head on its last step.

    A window lies wholly in the past, so the convolutions look both ways (padding ``same``): no step
    of it is hidden from another.
    """

    def __init__(self, config: ModelConfig, normalisation: Normalisation) -> None:
        super().__init__(config, normalisation)
        layers: list[nn.Module] = []
        num_in = config.num_channels
        for num_out in config.conv_channels:
            layers += [nn.Conv1d(num_in, num_out, config.kernel_size, padding="same"), nn.ReLU()]
            num_in = num_out
        self.conv = nn.Sequential(*layers)
        self.lstm = nn.LSTM(num_in, config.lstm_hidden, config.lstm_layers, batch_first=True)
        # One product for both: a head of few outputs gets kernels of its own, that round otherwise.
        self.head = nn.Linear(config.lstm_hidden, config.num_features + config.num_scores)

    def encode(self, normalised: Tensor) -> Tensor:
        steps = self.conv(normalised).transpose(1, 2)  # (B, T, conv channels)
        hidden, _ = self.lstm(steps)
        outputs: Tensor = self.head(hidden[:, -1])
        return outputs


class OwnNetwork(Network):
    """The user's ``nn.Module``, found by its import path: (B, C, T) normalised in, (B, F + S) out.

    Raises ValueError in its constructor if the class cannot be found or built, and when it gives
    another shape.
    """

    def __init__(self, config: ModelConfig, normalisation: Normalisation) -> None:
        super().__init__(config, normalisation)
        module_name, _, class_name = config.architecture.partition(":")
        try:
            body = getattr(importlib.import_module(module_name), class_name)(**config.options)
        except (ImportError, AttributeError, TypeError) as error:
            raise ValueError(
                f"architecture {config.architecture!r} cannot be built: {error}; install the "
                "package that holds it, or mend options"
            ) from error
        if not isinstance(body, nn.Module):
            raise ValueError(f"architecture {config.architecture!r} is no torch.nn.Module")
        self.body = body

    def encode(self, normalised: Tensor) -> Tensor:
        outputs: Tensor = self.body(normalised)
        expected = (len(normalised), self.config.num_features + self.config.num_scores)
        if tuple(outputs.shape) != expected:
            raise ValueError(
                f"{self.config.architecture} gave outputs of shape {tuple(outputs.shape)} for "
                f"{expected[0]} windows; {self.config.num_features} features and "
                f"{self.config.num_scores} scores ask for {expected}"
            )
        return outputs


def build_network(
    config: ModelConfig, normalisation: Normalisation, program: bytes | None = None
) -> Network:
    """A new network with weights as its constructor leaves them.

    Args:
        program: of an ``exported`` one.

    Raises ValueError.
    """
    if config.architecture == EXPORTED:
        from inference.exported import ExportedNetwork  # torch.export takes a second

        if program is None:
            raise ValueError("the architecture is exported, but there is no program")
        return ExportedNetwork(config, normalisation, program)
    if config.architecture == DEEPLOB:
        from inference.deeplob import DeepLob

        return DeepLob(config, normalisation)
    kind = CnnLstm if config.architecture == CNN_LSTM else OwnNetwork
    return kind(config, normalisation)


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
