"""``training.json``: what an artifact knows of its training, for whoever judges it later."""

from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from inference.artifact import Artifact
from inference.training.baselines import Baselines
from inference.training.drift import Distribution
from inference.training.evaluation import HorizonReport
from inference.training.trainer import Epoch, TrainingOptions
from schemas.errors import ConfigError


class PartRecord(BaseModel):
    """One part: how many windows, and the event times of the first and the last of them."""

    model_config = ConfigDict(frozen=True)

    num_windows: int
    from_us: int
    to_us: int

    def __str__(self) -> str:
        begin, end = (shown_time(at_us) for at_us in (self.from_us, self.to_us))
        return f"{self.num_windows:,} windows, {begin} to {end}"


class TrainingRecord(BaseModel):
    """How a model came about.

    Attributes:
        sources: files or topics, as they were named.
        thresholds_bps: one for each horizon; empty where labels came with the events.
        best_epoch: the one whose weights these are.
        test: the model on the test part, by horizon.
        channels, outputs: how the newest row of the training windows was spread, by channel, and
            what the model makes of them: features, then scores.
    """

    model_config = ConfigDict(frozen=True)

    sources: tuple[str, ...]
    symbols: tuple[str, ...]
    channels_version: str
    horizons: tuple[int, ...]
    thresholds_bps: tuple[float, ...]
    parts: dict[str, PartRecord]
    num_embargoed: int
    options: TrainingOptions
    epochs: tuple[Epoch, ...]
    best_epoch: int
    hardware: str
    baselines: Baselines
    test: tuple[HorizonReport, ...]
    channels: tuple[Distribution, ...]
    outputs: tuple[Distribution, ...]


def training_record(artifact: Artifact) -> TrainingRecord:
    """The artifact's. Raises ConfigError if it has none, or one that cannot be read."""
    if artifact.training is None:
        raise ConfigError(
            f"{artifact.model_version} has no record of its training; only a model of "
            "`tapeline model train` can be judged on other tapes"
        )
    try:
        return TrainingRecord.model_validate_json(artifact.training)
    except ValidationError as error:
        raise ConfigError(
            f"the record of {artifact.model_version}'s training cannot be read: {error}"
        ) from error


def shown_time(at_us: int) -> str:
    """An event time as a card says it."""
    return datetime.fromtimestamp(at_us / 1e6, UTC).strftime("%Y-%m-%d %H:%M:%S")
