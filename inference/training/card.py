"""The model card of a trained model: what it learned from, how good it is, where that ends."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from inference.artifact import Artifact
from inference.training.evaluation import BLOCK_S, HorizonReport
from inference.training.labels import CLASSES
from inference.training.record import TrainingRecord

_CARD = """# {artifact.model_version}

{verdict}

{facts}
## Test

Macro-F1 on the test part, which no choice looked at, with 95 % intervals: a bootstrap over blocks
of {block_s:g} s of event time, paired for the difference.

{test}
### Classes and calibration

{classes}
### By symbol

{symbols}
### By time

Macro-F1 in equal slices of the test part.

{times}
## Labels

The mean of the next k mids of the symbol against the mid now, k in events; flat below a threshold
that left a third of the training part flat:{thresholds}. Windows that
reach, with their labels, over a cut between parts are in none: {embargoed:,} of them.

## Training

{training}
## Limits

- Good on these symbols and this span, if at all; nothing is known of other markets, hours or
  regimes. `tapeline model evaluate` judges it on other tapes, `tapeline model drift` says when what
  it meets no longer looks like its training.
- A direction of the mid is no profit: spread, fees, queue position and latency are not in it.
- Windows and labels overlap; the intervals know that, the counts do not.
"""


def model_card(artifact: Artifact, record: TrainingRecord) -> str:
    """Markdown."""
    config = artifact.config
    parameters = sum(tensor.numel() for tensor in artifact.weights.values())
    facts = [
        ("sources", ", ".join(record.sources)),
        ("symbols", ", ".join(record.symbols)),
        *((name, str(part)) for name, part in record.parts.items()),
        (
            "input",
            f"float32, {config.num_channels} channels x {config.num_steps} steps, "
            f"`{record.channels_version}`",
        ),
        ("output", f"{config.num_features} features, {config.num_scores} scores: probabilities of "
                   f"{', '.join(CLASSES)} at {_listed(record.horizons)} events"),
        ("architecture", f"`{config.architecture}`, {parameters:,} parameters"),
    ]  # fmt: skip
    thresholds = "".join(
        f" {bps:.3f} bps at {horizon}," for horizon, bps in zip(
            record.horizons, record.thresholds_bps, strict=False)
    )  # fmt: skip
    return _CARD.format(
        artifact=artifact,
        verdict=verdict(record.test),
        facts=_table(("", ""), facts),
        block_s=BLOCK_S,
        test=test_table(record.test),
        classes=_table(
            ("events", *(f"{name}: precision, recall, F1" for name in CLASSES), "accuracy",
             "log loss", "calibration error"),
            (
                (
                    one.horizon,
                    *(
                        f"{kind.precision:.2f}, {kind.recall:.2f}, {kind.f1:.2f} of {kind.num:,}"
                        for kind in one.classes.values()
                    ),
                    f"{one.accuracy:.3f}",
                    f"{one.log_loss:.3f}",
                    f"{one.calibration_error:.3f}",
                )
                for one in record.test
            ),
        ),
        symbols=_by(record.test, {one.horizon: one.by_symbol for one in record.test}, "symbol"),
        times=_by(
            record.test,
            {one.horizon: {str(at_s): f1 for at_s, f1 in one.by_time.items()}
             for one in record.test},
            "from, Unix s",
        ),
        thresholds=thresholds.rstrip(",") or " they came with the events",
        embargoed=record.num_embargoed,
        training=_training(record),
    )  # fmt: skip


def verdict(test: Sequence[HorizonReport]) -> str:
    """Whether it beats the best guess that needs no network, said plainly."""
    sentences = []
    for one in test:
        name, best = max(one.baselines.items(), key=lambda pair: pair[1].macro_f1.value)
        ahead = best.model_ahead
        if ahead.low > 0:
            how = "beats"
        elif ahead.high < 0:
            how = "is **worse** than"
        else:
            how = "is **not told apart** from"
        sentences.append(
            f"At {one.horizon} events it {how} the best baseline, {name}: macro-F1 "
            f"{one.macro_f1} against {best.macro_f1}, ahead by {ahead}."
        )
    return "\n".join(sentences)


def test_table(test: Sequence[HorizonReport]) -> str:
    """The model and its baselines, one line a horizon."""
    names = list(test[0].baselines) if test else []
    return _table(
        ("events", "windows", "model", *names, *(f"ahead of {name}" for name in names)),
        (
            (
                one.horizon,
                f"{one.num:,}",
                one.macro_f1,
                *(one.baselines[name].macro_f1 for name in names),
                *(one.baselines[name].model_ahead for name in names),
            )
            for one in test
        ),
    )


def _by(test: Sequence[HorizonReport], found: dict[int, dict[str, float]], what: str) -> str:
    keys = sorted({key for values in found.values() for key in values})
    return _table(
        (what, *(f"{one.horizon} events" for one in test)),
        (
            (key, *(f"{values[key]:.3f}" if key in values else "-" for values in found.values()))
            for key in keys
        ),
    )


def _training(record: TrainingRecord) -> str:
    options = ", ".join(f"{name} {value}" for name, value in asdict(record.options).items())
    epochs = _table(
        ("epoch", "training loss", "validation loss", "validation macro-F1", "windows/s", "GPU"),
        (
            (
                f"{epoch.number}{' (these weights)' * (epoch.number == record.best_epoch)}",
                f"{epoch.train_loss:.4f}",
                f"{epoch.validation_loss:.4f}",
                ", ".join(f"{f1:.3f}" for f1 in epoch.macro_f1),
                f"{epoch.windows_per_s:,.0f}",
                "-" if epoch.gpu is None else f"{epoch.gpu:.0%}",
            )
            for epoch in record.epochs
        ),
    )
    return f"{options}; on {record.hardware}.\n\n{epochs}"


def _listed(numbers: Iterable[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} and {last}" if most else last


def _table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)
