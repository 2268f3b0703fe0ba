"""The overload as a picture: how late realtime's features are, and what each lane gets."""

import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.lanes.overload import ALONE, FIFO, LANES, MODES, STRICT, Overload

_NAMES = {
    ALONE: "realtime alone",
    LANES: "lanes, 2x capacity",
    FIFO: "one FIFO queue, 2x capacity",
    STRICT: "strict priority, 2x capacity",
}
_COLOURS = {ALONE: "#7f7f7f", LANES: "#1f77b4", FIFO: "#d62728", STRICT: "#ff7f0e"}
_WIDTH = 0.27


def save_plot(overload: Overload, path: Path) -> None:
    """Writes a PNG; no display is needed."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    latency, share = figure.subplots(1, 2)
    _plot_latency(latency, overload)
    _plot_shares(share, overload)
    figure.suptitle(
        f"{sum(overload.rates_hz.values()):.0f} events/s offered to a capacity of "
        f"{overload.capacity_hz:.0f} features/s ({overload.machine.partition(',')[0]})",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)


def _plot_latency(axes: Axes, overload: Overload) -> None:
    """Of realtime: how many features are later than so many milliseconds; all rounds together."""
    for mode in MODES:
        read_ms = np.sort(np.concatenate([one.read_ms for one in overload.plays[mode]]))
        later = 1 - np.arange(len(read_ms)) / len(read_ms)
        p99_ms = statistics.median(overload.figure(mode, 99))
        label = f"{_NAMES[mode]}: p99 {p99_ms:,.0f} ms"
        axes.plot(read_ms, later, color=_COLOURS[mode], label=label)
    axes.axhline(0.01, color="black", linewidth=0.8, linestyle=":")
    axes.set(
        title="realtime: from an event's append to its feature's reading",
        xlabel="ms",
        ylabel="share of features that are later",
        xscale="log",
        yscale="log",
        ylim=(5e-4, 1.1),
    )
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend(fontsize=8, loc="lower left")


def _plot_shares(axes: Axes, overload: Overload) -> None:
    """Of all features, each lane's part, beside what is reserved for it."""
    lanes = list(overload.rates_hz)
    places = np.arange(len(lanes))
    for number, mode in enumerate((LANES, FIFO, STRICT)):
        percents = [100 * overload.share(mode, lane) for lane in lanes]
        bars = axes.bar(
            places + (number - 1) * _WIDTH, percents, _WIDTH, color=_COLOURS[mode], label=mode
        )
        axes.bar_label(bars, fmt="%.1f", fontsize=7)
    for number, (place, lane) in enumerate(zip(places, lanes, strict=True)):
        reserved = 100 * overload.reserved[lane]
        label = "" if number else "reserved"  # the legend leaves out what has no name
        axes.hlines(
            reserved, place - 0.45, place + 0.45, color="black", linestyle="--", label=label
        )
    axes.set(title="share of the features, all lanes busy", ylabel="%")
    axes.set_xticks(places, lanes)
    axes.legend(fontsize=8)
