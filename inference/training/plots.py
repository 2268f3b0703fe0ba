"""An evaluation, drawn: against the baselines, by time, and whether probabilities are honest."""

from collections.abc import Sequence
from pathlib import Path

from inference.training.evaluation import HorizonReport
from schemas.errors import ConfigError


def plot_reports(reports: Sequence[HorizonReport], title: str, path: Path) -> None:
    """Writes one picture, PNG or SVG. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "a plot needs matplotlib; install it with `pip install 'tapeline[train]'`, or ask for "
            "--json"
        ) from error
    figure = Figure(figsize=(13, 4), layout="constrained")
    against, by_time, calibration = figure.subplots(1, 3)
    guesses = [("model", [one.macro_f1 for one in reports])] + [
        (name, [one.baselines[name].macro_f1 for one in reports]) for name in reports[0].baselines
    ]
    for number, (name, values) in enumerate(guesses):
        places = [place + 0.8 * number / len(guesses) for place in range(len(reports))]
        against.bar(
            places,
            [one.value for one in values],
            0.75 / len(guesses),
            yerr=[
                [one.value - one.low for one in values],
                [one.high - one.value for one in values],
            ],
            capsize=2,
            label=name,
        )
    middle = 0.4 - 0.4 / len(guesses)
    against.set_xticks([place + middle for place in range(len(reports))],
                       [str(one.horizon) for one in reports])  # fmt: skip
    against.set(xlabel="events ahead", ylabel="macro-F1, 95 % intervals")
    against.legend(fontsize=8)
    for one in reports:
        begin_s = min(one.by_time)
        label = f"{one.horizon} events"
        by_time.plot([at_s - begin_s for at_s in one.by_time], list(one.by_time.values()), "o-",
                     label=label)  # fmt: skip
        calibration.plot([bin.confidence for bin in one.calibration],
                         [bin.accuracy for bin in one.calibration], "o-", label=label)  # fmt: skip
    by_time.set(xlabel="seconds from the first window", ylabel="macro-F1")
    calibration.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    calibration.set(xlabel="probability that was given", ylabel="share that was right")
    by_time.legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
