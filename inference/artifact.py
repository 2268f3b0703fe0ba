"""A model as a folder: everything that makes its features, and nothing that runs code.

    config.json             sizes, normalisation, channel set, score names, precision, tolerance
    weights.safetensors     named as in the network's ``state_dict()``
    reference.safetensors   windows with the features and scores they must give
    README.md               the model card
    program.pt2             only where the network is an exported program: its graph
    training.json           only of a model that Tapeline trained: how, and on what
    manifest.json           sha256 of each file above

No pickle anywhere. A folder never changes once it is written; a new version is a new folder.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from inference.model import CNN_LSTM, ModelConfig, Network, Normalisation, Precision, build_network
from schemas.errors import ConfigError

FORMAT_VERSION = 1
DEFAULT_TOLERANCE = 1e-5
_CONFIG, _WEIGHTS, _REFERENCE, _CARD = (
    "config.json",
    "weights.safetensors",
    "reference.safetensors",
    "README.md",
)
_PROGRAM = "program.pt2"
_TRAINING = "training.json"
_MANIFEST = "manifest.json"
_NUM_REFERENCE_WINDOWS = 8
_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What the model must answer, whatever it runs on, within the artifact's tolerance.

    Attributes:
        windows: float32, shape (R, C, T).
        features: float32, shape (R, F), of the fp32 model on a CPU.
        scores: float32, shape (R, S).
    """

    windows: NDArray[np.float32]
    features: NDArray[np.float32]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Artifact:
    """One immutable model version.

    Attributes:
        model_version: ``<name>@<version>-<hash>``; the hash covers weights, sizes, normalisation
            and channel set, so two models that could differ in one feature never share a version.
        tolerance: largest absolute difference from ``reference`` that still counts as this model.
        precision: what the layers compute in.
        cuda_graphs: on a GPU, each batch shape is recorded once and replayed.
        program: an exported network's graph; see ``inference.exported``.
        training: the record of its training as JSON; see ``inference.training.record``.
        card: Markdown: what it was trained on, what its features mean, what it must not be used
            for.
    """

    name: str
    version: str
    model_version: str
    channels_version: str
    config: ModelConfig
    normalisation: Normalisation
    weights: Mapping[str, Tensor]
    reference: Reference
    card: str
    tolerance: float = DEFAULT_TOLERANCE
    precision: Precision = "fp32"
    cuda_graphs: bool = True
    program: bytes | None = None
    training: bytes | None = None

    @classmethod
    def from_model(
        cls,
        model: Network,
        *,
        name: str,
        version: str,
        channels_version: str,
        card: str,
        tolerance: float = DEFAULT_TOLERANCE,
        reference_windows: NDArray[np.float32] | None = None,
    ) -> Self:
        """Freezes a model on the CPU and works out its reference outputs.

        Args:
            reference_windows: float32 (R, C, T), best taken from the market the model is for;
                without them, 8 random windows of the normalisation's mean and scale.
        """
        weights = {key: value.detach().cpu().clone() for key, value in model.state_dict().items()}
        normalisation = Normalisation(
            model.mean.cpu().numpy().ravel(), model.scale.cpu().numpy().ravel(), model.clip
        )
        frozen = _build(model.config, normalisation, weights, model.program)
        if reference_windows is None:
            reference_windows = typical_windows(
                model.config, normalisation, _NUM_REFERENCE_WINDOWS, seed=0
            )
        with torch.inference_mode():
            features, scores = frozen(torch.tensor(reference_windows))
        draft = cls(
            name=name,
            version=version,
            model_version="",
            channels_version=channels_version,
            config=model.config,
            normalisation=normalisation,
            weights=weights,
            reference=Reference(reference_windows, features.numpy(), scores.numpy()),
            card=card,
            tolerance=tolerance,
            program=model.program,
        )
        return replace(draft, model_version=draft.expected_version)

    def with_card(self, card: str, training: bytes | None = None) -> Self:
        """The same model version under another card, and with the record of its training."""
        return replace(self, card=card, training=training or self.training)

    def build_model(self) -> Network:
        """A new module with these weights, on the CPU, in float32, in eval mode."""
        return _build(self.config, self.normalisation, self.weights, self.program)

    def as_variant(
        self,
        *,
        precision: Precision | None = None,
        cuda_graphs: bool | None = None,
        weights: Mapping[str, Tensor] | None = None,
        tolerance: float | None = None,
    ) -> Self:
        """The same model made to run otherwise, held to the same reference outputs.

        Its ``model_version`` says so, unless only ``cuda_graphs`` or ``tolerance`` differ.
        """
        variant = replace(
            self,
            precision=precision or self.precision,
            cuda_graphs=self.cuda_graphs if cuda_graphs is None else cuda_graphs,
            weights=self.weights if weights is None else weights,
            tolerance=tolerance or self.tolerance,
        )
        return replace(variant, model_version=variant.expected_version)

    @property
    def expected_version(self) -> str:
        """What ``model_version`` must be for these contents."""
        return f"{self.name}@{self.version}-{_digest(self)}"


class _Expected(NamedTuple):
    """What a tensor in a file must be."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


class _NormalisationFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    mean: list[float]
    scale: list[float]
    clip: float


class _ConfigFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1]
    name: str = Field(pattern=_NAME_PATTERN)
    version: str = Field(pattern=_NAME_PATTERN)
    model_version: str
    channels_version: str = Field(min_length=1)
    precision: Precision
    cuda_graphs: bool = True
    tolerance: float = Field(gt=0, allow_inf_nan=False)
    sizes: ModelConfig
    normalisation: _NormalisationFile


def save_artifact(artifact: Artifact, path: Path) -> None:
    """Writes the folder whole or not at all.

    Raises ConfigError when ``path`` exists (a version never changes under its readers), cannot be
    written, or when the artifact's name or version is not fit for a file.
    """
    demand_new(path)
    files = _encode(artifact)
    manifest = {"sha256": {name: _sha256(content) for name, content in files.items()}}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            for name, content in {**files, _MANIFEST: _json(manifest)}.items():
                (part / name).write_bytes(content)
            part.chmod(0o755)  # mkdtemp's 0700 would hide it from a service's own user
            part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"cannot write the model artifact {path}: {error.strerror or error}"
        ) from error


def demand_new(path: Path) -> None:
    """Raises ConfigError if there is something at ``path``."""
    if path.exists():
        raise ConfigError(f"{path} exists already; choose a new folder for each model version")


def load_artifact(
    path: Path, *, channels_version: str | None = None, num_steps: int | None = None
) -> Artifact:
    """Reads and checks a folder written by ``save_artifact``.

    Args:
        channels_version: the channel set that will feed it, where known.
        num_steps: the windows' length, where known.

    Raises:
        ConfigError: the folder is missing or damaged, of an unknown format, does not fit together,
            or does not fit the given channel set or length.
    """
    files = _read_checked(path)
    config_file = _parse_config(path, files[_CONFIG])
    config = config_file.sizes
    normalisation = _normalisation(path, config_file)
    weights = _tensors(path, _WEIGHTS, files[_WEIGHTS])
    program = files.get(_PROGRAM)
    _check_shapes(path, _WEIGHTS, weights, _expected_weights(path, config, program))
    reference = _tensors(path, _REFERENCE, files[_REFERENCE])
    _check_shapes(path, _REFERENCE, reference, _reference_shapes(config, reference))
    if channels_version is not None and channels_version != config_file.channels_version:
        raise ConfigError(
            f"{path} was made for channel set {config_file.channels_version!r}, not "
            f"{channels_version!r}; set window.channel_set or choose another model.artifact"
        )
    if num_steps is not None and num_steps != config.num_steps:
        raise ConfigError(
            f"{path} reads windows of {config.num_steps} steps, not {num_steps}; "
            f"set window.num_steps = {config.num_steps} or choose another model.artifact"
        )
    artifact = Artifact(
        name=config_file.name,
        version=config_file.version,
        model_version=config_file.model_version,
        channels_version=config_file.channels_version,
        config=config,
        normalisation=normalisation,
        weights=weights,
        reference=Reference(**{key: tensor.numpy() for key, tensor in reference.items()}),
        card=files[_CARD].decode("utf-8", "replace"),
        tolerance=config_file.tolerance,
        precision=config_file.precision,
        cuda_graphs=config_file.cuda_graphs,
        program=program,
        training=files.get(_TRAINING),
    )
    if artifact.model_version != artifact.expected_version:
        raise ConfigError(
            f"{path} calls itself {artifact.model_version}, but its contents are "
            f"{artifact.expected_version}; write it again with save_artifact"
        )
    return artifact


def typical_windows(
    config: ModelConfig, normalisation: Normalisation, num_windows: int, *, seed: int
) -> NDArray[np.float32]:
    """Seeded random windows, float32 (num_windows, C, T), normal in each channel's own unit."""
    shape = (num_windows, config.num_channels, config.num_steps)
    noise = np.random.default_rng(seed).standard_normal(shape)
    scaled = noise * normalisation.scale[:, None] + normalisation.mean[:, None]
    return scaled.astype(np.float32)


def _build(
    config: ModelConfig,
    normalisation: Normalisation,
    weights: Mapping[str, Tensor],
    program: bytes | None,
) -> Network:
    model = build_network(config, normalisation, program)
    model.load_state_dict(weights)
    return model.eval()


def _digest(artifact: Artifact) -> str:
    """8 hex digits over all that decides a feature."""
    config, normalisation, weights = artifact.config, artifact.normalisation, artifact.weights
    digest = hashlib.sha256()
    added_later = {"architecture", "options"} if config.architecture == CNN_LSTM else set()
    if config.score_groups == 1:
        added_later.add("score_groups")
    sizes = config.model_dump(mode="json", exclude=added_later)
    digest.update(_json([sizes, artifact.channels_version, normalisation.clip]))
    digest.update(normalisation.mean.tobytes() + normalisation.scale.tobytes())
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    if artifact.precision != "fp32":
        digest.update(artifact.precision.encode())
    if artifact.program is not None:
        digest.update(artifact.program)
    return digest.hexdigest()[:8]


def _encode(artifact: Artifact) -> dict[str, bytes]:
    reference = artifact.reference
    normalisation = artifact.normalisation
    try:
        config_file = _ConfigFile(
            format_version=FORMAT_VERSION,
            name=artifact.name,
            version=artifact.version,
            model_version=artifact.model_version,
            channels_version=artifact.channels_version,
            precision=artifact.precision,
            cuda_graphs=artifact.cuda_graphs,
            tolerance=artifact.tolerance,
            sizes=artifact.config,
            normalisation=_NormalisationFile(
                mean=normalisation.mean.tolist(),
                scale=normalisation.scale.tolist(),
                clip=normalisation.clip,
            ),
        )
    except ValidationError as error:
        raise ConfigError(f"the artifact cannot be saved: {_first_problem(error)}") from error
    optional = {_PROGRAM: artifact.program, _TRAINING: artifact.training}
    return {name: content for name, content in optional.items() if content is not None} | {
        _CONFIG: _json(config_file.model_dump(mode="json")),
        _WEIGHTS: safetensors.torch.save(dict(artifact.weights)),
        _REFERENCE: safetensors.numpy.save(
            {
                "windows": np.ascontiguousarray(reference.windows),
                "features": np.ascontiguousarray(reference.features),
                "scores": np.ascontiguousarray(reference.scores),
            }
        ),
        _CARD: artifact.card.encode(),
    }


def _read_checked(path: Path) -> dict[str, bytes]:
    """Every file's content, its checksum proven."""
    if not path.is_dir():
        raise ConfigError(f"there is no model artifact at {path}; model.artifact must be a folder")
    names = [_CONFIG, _WEIGHTS, _REFERENCE, _CARD]
    try:
        checksums = json.loads((path / _MANIFEST).read_bytes())["sha256"]
        names += [name for name in (_PROGRAM, _TRAINING) if name in checksums]
        files = {name: (path / name).read_bytes() for name in names}
        expected = {name: checksums[name] for name in names}
    except OSError as error:
        raise ConfigError(
            f"{path} is not a whole model artifact: cannot read {error.filename}: {error.strerror}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path / _MANIFEST} does not name the sha256 of {', '.join(names)}; "
            "copy the artifact again"
        ) from error
    for name, content in files.items():
        if _sha256(content) != expected[name]:
            raise ConfigError(
                f"{path / name} is damaged or was edited: its sha256 is not the manifest's; "
                "copy the artifact again"
            )
    return files


def _parse_config(path: Path, content: bytes) -> _ConfigFile:
    try:
        fields = json.loads(content)
        found = fields.get("format_version")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{path / _CONFIG} is not a JSON object: {error}") from error
    if found != FORMAT_VERSION:
        raise ConfigError(
            f"{path} has artifact format {found!r}, this Tapeline reads {FORMAT_VERSION}; "
            "upgrade Tapeline or save the model again"
        )
    try:
        return _ConfigFile.model_validate(fields)
    except ValidationError as error:
        raise ConfigError(f"{path / _CONFIG}: {_first_problem(error)}") from error


def _normalisation(path: Path, config_file: _ConfigFile) -> Normalisation:
    section = config_file.normalisation
    try:
        normalisation = Normalisation(section.mean, section.scale, section.clip)
    except ValueError as error:
        raise ConfigError(f"{path / _CONFIG}: normalisation: {error}") from error
    if len(normalisation.mean) != config_file.sizes.num_channels:
        raise ConfigError(
            f"{path / _CONFIG}: normalisation covers {len(normalisation.mean)} channels, "
            f"sizes.num_channels is {config_file.sizes.num_channels}"
        )
    return normalisation


def _tensors(path: Path, name: str, content: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ConfigError(f"{path / name} is not a safetensors file: {error}") from error


def _expected_weights(
    path: Path, config: ModelConfig, program: bytes | None
) -> dict[str, _Expected]:
    normalisation = Normalisation([0] * config.num_channels, [1] * config.num_channels)
    try:
        if config.architecture == CNN_LSTM:
            with torch.device("meta"):  # shapes alone: no memory, no random numbers
                model = build_network(config, normalisation)
        else:
            model = build_network(config, normalisation, program)
    except ValueError as error:
        raise ConfigError(f"{path / _CONFIG}: sizes: {error}") from error
    return {
        name: _Expected(tuple(tensor.shape), tensor.dtype)
        for name, tensor in model.state_dict().items()
    }


def _reference_shapes(config: ModelConfig, reference: Mapping[str, Tensor]) -> dict[str, _Expected]:
    windows = reference.get("windows")
    num_windows = max(len(windows) if windows is not None and windows.dim() else 0, 1)
    return {
        "windows": _Expected((num_windows, config.num_channels, config.num_steps)),
        "features": _Expected((num_windows, config.num_features)),
        "scores": _Expected((num_windows, config.num_scores)),
    }


def _check_shapes(
    path: Path,
    file_name: str,
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, _Expected],
) -> None:
    where = path / file_name
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ConfigError(f"{where} lacks {', '.join(missing)}, which {_CONFIG}'s sizes ask for")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise ConfigError(f"{where} holds {', '.join(extra)}, unknown to {_CONFIG}'s sizes")
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{where}: {name} has shape {tuple(tensor.shape)}, "
                f"{_CONFIG}'s sizes ask for {shape}"
            )
        if tensor.dtype != dtype:
            raise ConfigError(f"{where}: {name} is {tensor.dtype}, it must be {dtype}")
        if not tensor.isfinite().all():
            raise ConfigError(f"{where}: {name} holds values that are not finite")


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
