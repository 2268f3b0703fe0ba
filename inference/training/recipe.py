"""From a split tape to an artifact: train, judge the test part as it will serve, write it down."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inference.artifact import Artifact
from inference.bench import hardware
from inference.engine import Engine, build_engine, resolve_device
from inference.model import ModelConfig
from inference.training.baselines import Baselines, fit_baselines
from inference.training.card import model_card
from inference.training.drift import distributions, drifts
from inference.training.evaluation import HorizonReport, evaluate
from inference.training.labels import Split, covered, labelled, score_names
from inference.training.record import PartRecord, TrainingRecord, training_record
from inference.training.tape import Part, Tape
from inference.training.trainer import Epoch, Trainer, TrainingOptions, fit_normalisation
from schemas.errors import ConfigError
from schemas.settings import ModelSettings

_NUM_REFERENCE = 8
_AT_ONCE = 2_048  # windows that are made at a time
_MAX_REMEMBERED = 20_000  # windows whose values are kept as distributions


@dataclass(frozen=True, slots=True)
class Origin:
    """Where the windows come from, and what the artifact is to be called."""

    name: str
    version: str
    channels_version: str
    sources: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Progress:
    """Whom to tell: windows done of how many of an epoch, and each epoch's figures."""

    on_batch: Callable[[int, int], None] = lambda done, total: None
    on_epoch: Callable[[Epoch], None] = lambda epoch: None


def config_for(base: ModelConfig, tape: Tape, horizons: tuple[int, ...]) -> ModelConfig:
    """The architecture with this tape's sizes and a group of scores for each horizon."""
    fields = base.model_dump() | {
        "num_channels": tape.num_channels,
        "num_steps": tape.num_steps,
        "score_names": score_names(horizons),
        "score_activation": "softmax",
        "score_groups": len(horizons),
    }
    return ModelConfig.model_validate(fields)


def train(
    parts: Split,
    base: ModelConfig,
    horizons: tuple[int, ...],
    options: TrainingOptions,
    origin: Origin,
    settings: ModelSettings,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Trains and judges; blocks for as long as that takes.

    The test part is scored by ``Engine``, the code that serves, after the last epoch and only then.

    Args:
        base: the architecture and its own sizes; scores and window are the tape's.

    Raises ConfigError: sizes that cannot be, a checkpoint of another run, no scikit-learn.
    """
    progress = progress or Progress()
    tape = parts.train.tape
    device = resolve_device(settings.device)
    trainer = Trainer(
        config_for(base, tape, horizons),
        fit_normalisation(tape.rows[covered(parts.train)]),
        parts.train,
        parts.validation,
        options,
        device=device,
        checkpoint=checkpoint,
    )
    network = trainer.run(progress.on_batch, progress.on_epoch).cpu()
    spaced = np.linspace(0, len(parts.validation) - 1, _NUM_REFERENCE).astype(np.int64)
    artifact = Artifact.from_model(
        network,
        name=origin.name,
        version=origin.version,
        channels_version=origin.channels_version,
        card="",
        reference_windows=parts.validation.windows(spaced),
    )
    engine = build_engine(artifact, settings)
    fitted = fit_baselines(parts.train, origin.channels_version)
    sample = parts.train.every(-(-len(parts.train) // _MAX_REMEMBERED))
    record = TrainingRecord(
        sources=origin.sources,
        symbols=tuple(sorted(set(tape.symbols))),
        channels_version=origin.channels_version,
        horizons=horizons,
        thresholds_bps=parts.thresholds_bps,
        parts={
            name: _part_record(part)
            for name, part in (
                ("training", parts.train),
                ("validation", parts.validation),
                ("test", parts.test),
            )
        },
        num_embargoed=parts.num_embargoed,
        options=options,
        epochs=tuple(trainer.history),
        best_epoch=trainer.best_epoch,
        hardware=hardware(str(device)),
        baselines=fitted,
        test=_judge(
            engine, parts.test, fitted, horizons, parts.thresholds_bps, origin.channels_version
        ),
        channels=distributions(tape.rows[sample.ends]),
        outputs=distributions(outputs_of(engine, sample)),
    )
    return artifact.with_card(model_card(artifact, record), record.model_dump_json().encode())


def judge_on(
    artifact: Artifact, tape: Tape, settings: ModelSettings, *, later: bool = False
) -> tuple[HorizonReport, ...]:
    """A trained artifact on another tape, by the thresholds and the baselines of its training.

    Args:
        later: only on windows that begin after the first window of its test part has ended: what is
            before is known to training or validation, of whatever symbol, for they move together.

    Raises ConfigError: no record of a training, another window, nothing to judge.
    """
    record = training_record(artifact)
    part = labelled(_fitting(artifact, tape), record.horizons, record.thresholds_bps)
    if later:
        begins_us = tape.times_us[part.ends - tape.num_steps + 1]
        part = part.those(begins_us >= record.parts["test"].from_us)
    if not (part.labels >= 0).any():
        raise ConfigError(
            f"no window of {tape.num_steps} events on these tapes has a label at "
            f"{max(record.horizons)} events; give longer{' and later' * later} tapes, with quotes "
            "or books"
        )
    engine = build_engine(artifact, settings)
    return _judge(
        engine,
        part,
        record.baselines,
        record.horizons,
        record.thresholds_bps,
        record.channels_version,
    )


@dataclass(frozen=True, slots=True)
class DriftReport:
    """Population stability indices against the training part, by name; and of how many windows."""

    num_windows: int
    channels: dict[str, float]
    outputs: dict[str, float]


def drift_on(artifact: Artifact, tape: Tape, settings: ModelSettings) -> DriftReport:
    """How far a tape, and what the model makes of it, is from what it was trained on."""
    record = training_record(artifact)
    ends = _fitting(artifact, tape).ends()
    if not len(ends):
        raise ConfigError(f"no window of {tape.num_steps} events is on these tapes")
    ends = ends[:: -(-len(ends) // _MAX_REMEMBERED)]
    part = Part(tape, ends, np.zeros((len(ends), 0), np.int8))
    outputs = outputs_of(build_engine(artifact, settings), part)
    config = artifact.config
    names = [f"feature {number}" for number in range(config.num_features)] + [*config.score_names]
    by_channel = drifts(record.channels, tape.rows[ends]).tolist()
    return DriftReport(
        num_windows=len(ends),
        channels={f"channel {number}": one for number, one in enumerate(by_channel)},
        outputs=dict(zip(names, drifts(record.outputs, outputs).tolist(), strict=True)),
    )


def outputs_of(engine: Engine, part: Part) -> np.ndarray:
    """Features and scores of a part's windows side by side: float32 (n, F + S)."""
    found = []
    for begin in range(0, len(part), _AT_ONCE):
        inference = engine.infer(part.windows(slice(begin, begin + _AT_ONCE)))
        found.append(np.concatenate([inference.features, inference.scores], axis=1))
    return np.concatenate(found)


def _judge(
    engine: Engine,
    part: Part,
    fitted: Baselines,
    horizons: tuple[int, ...],
    thresholds: tuple[float, ...],
    channels_version: str,
) -> tuple[HorizonReport, ...]:
    scores = outputs_of(engine, part)[:, -len(score_names(horizons)) :]
    guesses = fitted.guesses(part, horizons, thresholds, channels_version)
    return evaluate(part, scores, horizons, guesses)


def _part_record(part: Part) -> PartRecord:
    begin_us, end_us = part.between_us
    return PartRecord(num_windows=len(part), from_us=begin_us, to_us=end_us)


def _fitting(artifact: Artifact, tape: Tape) -> Tape:
    config = artifact.config
    if (tape.num_channels, tape.num_steps) != (config.num_channels, config.num_steps):
        raise ConfigError(
            f"{artifact.model_version} reads windows of {config.num_channels} channels and "
            f"{config.num_steps} steps; the tape has {tape.num_channels} and {tape.num_steps}; "
            "set window.channel_set and window.num_steps to the model's"
        )
    return tape
