"""``tapeline model train | evaluate | drift``: a model from recorded events, and on others."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from schemas.errors import ConfigError
from tapeline.cli.tape import FormatOption, SymbolOption, VenueOption
from tapeline.cli.terminal import (
    JsonOption,
    cell,
    count_progress,
    err,
    out,
    print_json,
    print_table,
    settings_of,
)

if TYPE_CHECKING:
    from inference.artifact import Artifact
    from inference.model import ModelConfig
    from inference.training.evaluation import HorizonReport
    from inference.training.labels import Split
    from inference.training.recipe import Progress
    from inference.training.tape import Tape
    from inference.training.trainer import Epoch, TrainingOptions
    from schemas.settings import Settings

_SMALL = {"conv_channels": [16, 32], "lstm_hidden": 32, "lstm_layers": 1, "num_features": 16}
_MAX_SHOWN = 10

FilesArgument = Annotated[
    list[Path] | None, typer.Argument(help="Tapes; several are merged by event time.")
]
ArtifactArgument = Annotated[Path, typer.Argument(help="A model folder of `tapeline model train`.")]
LaneOption = Annotated[str | None, typer.Option(help="Read this lane's topic instead of files.")]
SinceOption = Annotated[
    str | None, typer.Option(help="Of the lane: appended since a time (2024-08-08T12:00) or 2h.")
]
UntilOption = Annotated[str | None, typer.Option(help="Of the lane: appended before then.")]


def train(
    ctx: typer.Context,
    target: Annotated[Path, typer.Argument(help="The new model folder.")],
    files: FilesArgument = None,
    lane: LaneOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    format: FormatOption = None,
    symbol: SymbolOption = None,
    venue: VenueOption = None,
    fi2010_test: Annotated[
        list[Path] | None,
        typer.Option(help="FILES is FI-2010's training file; test on this, may be given again."),
    ] = None,
    architecture: Annotated[
        str, typer.Option(help="cnn_lstm, deeplob, or package.module:Class of your own.")
    ] = "cnn_lstm",
    sizes: Annotated[
        list[str] | None,
        typer.Option("--set", help="A size of the model: lstm_hidden=64, conv_channels=[32,64]."),
    ] = None,
    small: Annotated[
        bool, typer.Option("--small", help="A small cnn_lstm, for two cores and a first try.")
    ] = False,
    horizon: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Events to look ahead; may be given again. Default: 10, 50, 100."),
    ] = None,
    train_share: Annotated[float, typer.Option(min=0.05, max=0.9)] = 0.6,
    validation_share: Annotated[float, typer.Option(min=0.02, max=0.5)] = 0.15,
    epochs: Annotated[int, typer.Option(min=1)] = 6,
    batch: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 256,
    rate: Annotated[float, typer.Option(help="AdamW's learning rate, at first.")] = 3e-4,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.1,
    patience: Annotated[
        int, typer.Option(min=0, help="So many epochs may pass without a lower validation loss.")
    ] = 2,
    stride: Annotated[
        int, typer.Option(min=1, help="Train on every so many-th window: neighbours are alike.")
    ] = 1,
    balance: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Weight of rare classes: 0 as rare as they are, 1 all alike."
        ),
    ] = 0.5,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16: autocast.")] = "fp32",
    seed: Annotated[int, typer.Option()] = 0,
    name: Annotated[str | None, typer.Option(help="Of the model; else the folder's.")] = None,
    version: Annotated[str, typer.Option(help="Of the model.")] = "1",
    json: JsonOption = False,
) -> None:
    """Train a model on recorded events, and judge it on the part that comes last.

    Reads tapes, or a lane's topic by time. Windows are those that a worker makes of the same
    events. The artifact serves as it is: `tapeline model promote`, or model.artifact. A run that
    was cut off goes on where it was when the same command is given again.
    """
    from inference.artifact import demand_new, save_artifact
    from inference.training.recipe import Origin
    from inference.training.recipe import train as train_model
    from inference.training.trainer import TrainingOptions

    demand_new(target)
    settings = settings_of(ctx)
    horizons = tuple(sorted(set(horizon or (10, 50, 100))))
    base = _base_config(architecture, sizes or [], small=small)
    options = _checked(
        TrainingOptions,
        epochs=epochs,
        batch_size=batch,
        learning_rate=rate,
        weight_decay=weight_decay,
        patience=patience,
        seed=seed,
        precision=precision,
        stride=stride,
        balance=balance,
    )
    if fi2010_test:
        parts, channels_version = _fi2010(
            settings, files or [], fi2010_test, horizons, validation_share
        )
        sources = [*map(_name, [*(files or []), *fi2010_test])]
    else:
        recorded = _Recording(files or [], lane, since, until, format, symbol, venue)
        parts = _split(recorded.read(settings), horizons, (train_share, validation_share))
        channels_version, sources = settings.window.channel_set, recorded.names
    checkpoint = target.with_name(f"{target.name}.checkpoint")
    if checkpoint.exists():
        err().print(f"going on from {checkpoint}", highlight=False)
    with _training_progress(epochs) as progress:
        artifact = train_model(
            parts,
            base,
            horizons,
            options,
            Origin(name or target.name, version, channels_version, tuple(sources)),
            settings.model,
            checkpoint=checkpoint,
            progress=progress,
        )
    save_artifact(artifact, target)
    checkpoint.unlink(missing_ok=True)
    _show_trained(artifact, target, json=json)


def evaluate(
    ctx: typer.Context,
    artifact: ArtifactArgument,
    files: FilesArgument = None,
    lane: LaneOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    format: FormatOption = None,
    symbol: SymbolOption = None,
    venue: VenueOption = None,
    later: Annotated[
        bool, typer.Option("--later", help="Only what is later than its training and validation.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it there, PNG or SVG; needs matplotlib.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Judge a trained model on other events: macro-F1 with intervals, against its baselines.

    Labels are by the thresholds of the training; baselines are those fitted then.
    """
    from inference.artifact import load_artifact
    from inference.training.plots import plot_reports
    from inference.training.recipe import judge_on

    settings = settings_of(ctx)
    model = load_artifact(artifact)
    tape = _Recording(files or [], lane, since, until, format, symbol, venue).read(settings)
    with err().status("judging"):
        reports = judge_on(model, tape, settings.model, later=later)
    if plot:
        plot_reports(reports, model.model_version, plot)
    if json:
        print_json([one.model_dump() for one in reports])
        return
    _show_reports(reports)


def drift(
    ctx: typer.Context,
    artifact: ArtifactArgument,
    files: FilesArgument = None,
    lane: LaneOption = None,
    since: SinceOption = None,
    until: UntilOption = None,
    format: FormatOption = None,
    symbol: SymbolOption = None,
    venue: VenueOption = None,
    max_index: Annotated[
        float | None, typer.Option(help="Exit 1 if an index is above: 0.25 is much.", min=0)
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare events, and what a trained model makes of them, with those it was trained on.

    Shows population stability indices, the largest first: below 0.1 little has changed, above 0.25
    much has.
    """
    from inference.artifact import load_artifact
    from inference.training.recipe import drift_on

    settings = settings_of(ctx)
    tape = _Recording(files or [], lane, since, until, format, symbol, venue).read(settings)
    with err().status("comparing"):
        report = drift_on(load_artifact(artifact), tape, settings.model)
    if json:
        print_json(report)
    else:
        for what, found in (("channels", report.channels), ("outputs", report.outputs)):
            ranked = sorted(found.items(), key=lambda pair: -pair[1])[:_MAX_SHOWN]
            print_table((what, "stability index"), ranked, title=f"{report.num_windows:,} windows")
    largest = max([*report.channels.values(), *report.outputs.values()])
    if max_index is not None and largest > max_index:
        raise typer.Exit(1)


@dataclass(frozen=True, slots=True)
class _Recording:
    """What a command is to read: files or a lane's topic."""

    files: list[Path]
    lane: str | None
    since: str | None
    until: str | None
    format: str | None
    symbol: str | None
    venue: str | None

    @property
    def names(self) -> list[str]:
        if self.files:
            return [*map(_name, self.files)]
        span = [f"{what} {time}" for what, time in
                (("since", self.since), ("until", self.until)) if time]  # fmt: skip
        return [" ".join([f"lane {self.lane}", *span])]

    def read(self, settings: "Settings") -> "Tape":
        """Raises ConfigError for both or neither, and for a tape without a window."""
        if bool(self.files) == bool(self.lane):
            raise ConfigError("name files, or a lane with --lane; not both and not neither")
        if self.files and (self.since or self.until):
            raise ConfigError("--since and --until choose from a lane; files are read whole")
        tape = self._read_files(settings) if self.files else self._read_lane(settings)
        if not len(tape.rows):
            raise ConfigError(
                f"no symbol in {', '.join(self.names)} has {tape.num_steps} events in a row; give "
                "longer tapes, or a smaller window.num_steps"
            )
        return tape

    def _read_files(self, settings: "Settings") -> "Tape":
        from tapeline.sources import open_source
        from tapeline.training.tapes import record_files

        with (
            open_source(self.files, self.format, symbol=self.symbol, venue=self.venue) as source,
            count_progress("reading") as show,
        ):
            tape = record_files(
                source, settings, lambda: show(source.bytes_read, source.total_bytes)
            )
            statistics = source.statistics()
        if statistics.num_rejected:
            err().print(f"{statistics.num_rejected:,} rows are no events: "
                        f"{statistics.first_rejects[0]}", highlight=False)  # fmt: skip
        return tape

    def _read_lane(self, settings: "Settings") -> "Tape":
        from tapeline.reading import parse_time_us
        from tapeline.training.tapes import record_lane

        now_us = time.time_ns() // 1000
        since_us, until_us = (
            None if text is None else parse_time_us(text, now_us)
            for text in (self.since, self.until)
        )
        with count_progress("reading") as show:
            return record_lane(
                settings, self.lane or "", since_us=since_us, until_us=until_us, progress=show
            )


def _fi2010(
    settings: "Settings",
    files: list[Path],
    tests: list[Path],
    horizons: tuple[int, ...],
    validation_share: float,
) -> tuple["Split", str]:
    from tapeline.training.fi2010 import CHANNELS_VERSION, read_fi2010

    if len(files) != 1:
        raise ConfigError("with --fi2010-test, FILES is the one training file of FI-2010")
    with err().status("reading"):
        parts = read_fi2010(
            files[0],
            tests,
            horizons,
            num_steps=settings.window.num_steps,
            validation_share=validation_share,
        )
    return parts, CHANNELS_VERSION


def _split(tape: "Tape", horizons: tuple[int, ...], shares: tuple[float, float]) -> "Split":
    from inference.training.labels import split

    if sum(shares) >= 1:
        raise ConfigError("--train-share and --validation-share leave nothing for the test")
    return split(tape, horizons, shares)


def _base_config(architecture: str, sizes: list[str], *, small: bool) -> "ModelConfig":
    import json as json_text

    from pydantic import ValidationError

    from inference.model import CNN_LSTM, ModelConfig

    if small and architecture != CNN_LSTM:
        raise ConfigError(f"--small is a {CNN_LSTM}; leave it out, or --architecture")
    fields: dict[str, Any] = {"architecture": architecture} | (_SMALL if small else {})
    for text in sizes:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {text!r} must be name=value, for example lstm_hidden=64")
        try:
            fields[key] = json_text.loads(value)
        except ValueError as error:
            raise ConfigError(f"--set {text!r}: {value!r} is no JSON value: {error}") from error
    try:
        return ModelConfig.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "--set"
        raise ConfigError(f"{where}: {first['msg']}; see docs/training.md") from error


def _checked(kind: type["TrainingOptions"], **values: Any) -> "TrainingOptions":
    if values["precision"] not in ("fp32", "bf16", "fp16"):
        raise ConfigError(f"--precision is fp32, bf16 or fp16, not {values['precision']!r}")
    if not 0 < values["learning_rate"] < 1:
        raise ConfigError(f"--rate must be between 0 and 1, not {values['learning_rate']:g}")
    return kind(**values)


def _show_trained(artifact: "Artifact", target: Path, *, json: bool) -> None:
    from inference.training.record import training_record

    record = training_record(artifact)
    if json:
        print_json({"model_version": artifact.model_version, "written": target,
                    "training": record.model_dump(exclude={"channels", "outputs"})})  # fmt: skip
        return
    _show_reports(record.test)
    out().print(f"wrote {target}: {artifact.model_version}", highlight=False)


def _show_reports(reports: "tuple[HorizonReport, ...]") -> None:
    from inference.training.card import verdict

    rows: list[tuple[object, ...]] = []
    for one in reports:
        rows.append((one.horizon, "model", str(one.macro_f1), "", one.num))
        for name, other in one.baselines.items():
            rows.append((one.horizon, name, str(other.macro_f1), str(other.model_ahead), one.num))
    print_table(("events ahead", "guess", "macro-F1 (95 %)", "model is ahead by", "windows"), rows)
    out().print(verdict(reports).replace("**", ""), highlight=False)


@contextmanager
def _training_progress(num_epochs: int) -> Iterator["Progress"]:
    """A bar for the epoch that runs, and a line for each that is through."""
    from inference.training.recipe import Progress

    console = err()

    def show(epoch: "Epoch") -> None:
        figures = ", ".join(cell(one, 3) for one in epoch.macro_f1)
        console.print(
            f"epoch {epoch.number} of {num_epochs}: loss {epoch.train_loss:.4f}, validation "
            f"{epoch.validation_loss:.4f}, macro-F1 {figures}; "
            f"{epoch.windows_per_s:,.0f} windows/s",
            highlight=False,
        )

    with count_progress("training", console) as on_batch:
        yield Progress(on_batch=on_batch, on_epoch=show)


def _name(file: Path) -> str:
    """Without the folders of this machine."""
    return file.name
