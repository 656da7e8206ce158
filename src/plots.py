"""The pictures beside the numbers, as PNG: spectrograms, training curves, per-class charts, calibration, confusions, timelines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.stats import binomtest

from .config import AudioConfig
from .metrics import Reliability
from .storage import atomic


def save(figure: Figure, path: Path, dpi: int = 100) -> None:
    with atomic(path) as partial:
        figure.savefig(partial, dpi=dpi, format="png")


def plain(text: str, most: int = 60) -> str:
    """A name from the data as a picture's text: a $ starts no formula, and an endless name is cut."""
    return (text if len(text) <= most else text[: most - 1] + "…").replace("$", r"\$")


def draw_spectrogram(axes: Axes, log_mel: np.ndarray, config: AudioConfig, seconds: float | None = None) -> None:
    """(n_mels, frames) dB; the contrast spans the 5th percentile to the peak."""
    seconds = seconds or log_mel.shape[1] / config.frames_per_second
    low, high = np.percentile(log_mel, 5), log_mel.max()
    axes.imshow(log_mel, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, config.n_mels),
                vmin=low, vmax=max(high, low + 1), interpolation="nearest")
    hertz = np.array([50, 100, 200, 500, 1000, 2000, 4000, 8000])
    hertz = hertz[(hertz >= config.fmax / 32) & (hertz <= config.fmax)]
    axes.set_yticks(np.interp(_mel(hertz), np.linspace(_mel(config.fmin), _mel(config.fmax), config.n_mels + 2),
                              np.arange(-1.0, config.n_mels + 1)) + 0.5, [f"{h / 1000:g}k" for h in hertz])


def _mel(hertz: np.ndarray | float) -> np.ndarray:
    """Slaney's mel scale: linear to 1 kHz, logarithmic above."""
    hertz = np.asarray(hertz, float)
    return np.where(hertz < 1000, hertz * 3 / 200, 15 + 27 * np.log(np.maximum(hertz, 1000) / 1000) / np.log(6.4))


def spectrogram_grid(path: Path, log_mels: Sequence[np.ndarray], titles: Sequence[str], config: AudioConfig, heading: str) -> None:
    """A grid of at most 16 windows with a title each."""
    log_mels, columns = log_mels[:16], 4
    rows = -(-len(log_mels) // columns)
    figure = Figure(figsize=(4 * columns, 2.4 * rows + 0.5), layout="constrained")
    figure.suptitle(plain(heading, 120))
    for axes, log_mel, title in zip(figure.subplots(rows, columns, squeeze=False).flat, log_mels, titles):
        draw_spectrogram(axes, log_mel, config)
        axes.set_title(plain(title), fontsize=9)
    for axes in figure.axes[len(log_mels) :]:
        axes.set_axis_off()
    save(figure, path)


def curves(path: Path, history: pd.DataFrame, heading: str, loss_name: str) -> None:
    """Loss, held-out scores and learning rate over the epochs."""
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    figure.suptitle(plain(heading, 200))
    loss, scores, rate = figure.subplots(1, 3)
    validated = history.dropna(subset="valid_loss")
    loss.plot(history.epoch, history.train_loss, label="training (augmented)")
    loss.plot(validated.epoch, validated.valid_loss, marker=".", label="held out")
    loss.set(xlabel="epoch", title=f"loss (training: {loss_name}, held out: bce)", yscale="log")
    scores.plot(validated.epoch, validated.valid_top1, marker=".", label="top-1")
    scores.plot(validated.epoch, validated.valid_macro_ap, marker=".", label="macro AP")
    scores.set(xlabel="epoch", title="held out, first window of each recording", ylim=(0, 1))
    rate.plot(history.epoch, history.learning_rate, color="C2")
    rate.set(xlabel="epoch", title="learning rate at the epoch's end")
    for axes in (loss, scores):
        axes.legend()
    save(figure, path)


def curves_of_folds(path: Path, histories: dict[int, pd.DataFrame], heading: str) -> None:
    """Losses and held-out scores over the epochs: one line a fold, their mean in black."""
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    figure.suptitle(plain(heading, 200))
    titles = {"train_loss": "training loss (augmented)", "valid_loss": "held-out loss", "valid_top1": "held-out top-1", "valid_macro_ap": "held-out macro AP"}
    mean = pd.concat(histories.values()).groupby("epoch").mean()
    for axes, (column, title) in zip(figure.subplots(1, 4), titles.items()):
        for fold, history in histories.items():
            axes.plot(history.epoch, history[column], marker=".", linewidth=1, label=f"fold {fold}")
        if len(histories) > 1:
            axes.plot(mean.index, mean[column], color="black", linewidth=2, label="mean")
        axes.set(xlabel="epoch", title=title, xlim=(mean.index[0] - 0.5, mean.index[-1] + 0.5))
        if not column.endswith("loss"):
            axes.set_ylim(0, 1)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.axes[0].legend(fontsize=8)
    save(figure, path)


def reliability_diagram(path: Path, curves: dict[str, Reliability], heading: str) -> None:
    """What share of the predictions in each bin of probability was true, with 95 % intervals (Wilson), and how many there are."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    figure.suptitle(plain(heading, 200))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    top.plot([0, 1], [0, 1], color="0.6", linestyle="--", label="a probability that means what it says")
    for number, (name, curve) in enumerate(curves.items()):
        full = curve.count > 0
        counts, share, mean = curve.count[full], curve.share[full], curve.mean[full]
        intervals = [binomtest(round(s * n), n).proportion_ci(method="wilson") for s, n in zip(share, counts.tolist())]
        errors = np.clip([[s - i.low for s, i in zip(share, intervals)], [i.high - s for s, i in zip(share, intervals)]], 0, 1)
        top.errorbar(mean, share, yerr=errors, marker="o", markersize=4, capsize=3, color=f"C{number}",
                     label=f"{name}: expected calibration error {curve.error:.3f}")
        edges = np.linspace(0, 1, len(curve.count) + 1)
        bottom.stairs(np.maximum(curve.count, 0.5), edges, color=f"C{number}", baseline=0.5)
    top.set(ylabel="share that was true", ylim=(-0.02, 1.02))
    top.legend(fontsize=9)
    bottom.set(xlabel="out-of-fold probability", ylabel="how many", yscale="log", xlim=(-0.01, 1.01))
    save(figure, path)


def confusion_matrix(path: Path, counts: np.ndarray, shown: np.ndarray, classes: Sequence[str], heading: str) -> None:
    """Rows: the true class; columns: what its recordings were taken for; the classes not shown are summed up in the last column.

    counts (C, C) of all classes, shown: the columns of those in the picture. Colour: share of the row; figures: recordings.
    """
    total = counts[shown].sum(axis=1, keepdims=True)
    cells, names = counts[np.ix_(shown, shown)], [plain(classes[c], 24) for c in shown]
    columns = names
    if len(shown) < len(counts) and cells.sum() < total.sum():
        cells, columns = np.hstack([cells, total - cells.sum(axis=1, keepdims=True)]), [*names, "all others"]
    side = max(5.0, 0.36 * len(shown) + 2.5)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    figure.suptitle(plain(heading, 200))
    axes = figure.subplots()
    share = cells / np.maximum(total, 1)
    image = axes.imshow(share, aspect="auto", cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(cells)):
        axes.text(column, row, str(cells[row, column]), ha="center", va="center", fontsize=8, color="white" if share[row, column] > 0.5 else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), [f"{name} ({n})" for name, n in zip(names, total[:, 0])], fontsize=8)
    axes.set(xlabel="taken for", ylabel="true class (held-out recordings)")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.6)
    save(figure, path)


def spectrogram_pairs(path: Path, pairs: Sequence[Sequence[tuple[np.ndarray | None, str]]], config: AudioConfig, heading: str) -> None:
    """One row a pair: two windows (n_mels, frames) dB, or None, each under its title."""
    figure = Figure(figsize=(14, 2.3 * len(pairs) + 0.6), layout="constrained")
    figure.suptitle(plain(heading, 200))
    for line, pair in zip(figure.subplots(len(pairs), 2, squeeze=False), pairs):
        for axes, (log_mel, title) in zip(line, pair):
            axes.set_title(title, fontsize=9, loc="left")
            if log_mel is None:
                axes.set_axis_off()
                continue
            draw_spectrogram(axes, log_mel, config)
            axes.set(xlim=(0, config.window_seconds), ylabel="Hz")
    for axes in figure.axes[-2:]:
        axes.set_xlabel("seconds")
    save(figure, path)


def per_class_chart(path: Path, table: pd.DataFrame, heading: str) -> None:
    """AP of every class, best to worst, and against its number of recordings. Columns: primary_label, ap, recordings."""
    table = table.dropna(subset="ap").sort_values("ap", ascending=False)
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    figure.suptitle(plain(heading, 200))
    bars, scatter = figure.subplots(1, 2, width_ratios=(3, 1))
    bars.bar(range(len(table)), table.ap, width=0.9)
    if len(table) <= 60:
        bars.set_xticks(range(len(table)), [plain(label, 24) for label in table.primary_label], rotation=90, fontsize=8)
    bars.axhline(table.ap.mean(), color="C1", label=f"macro AP {table.ap.mean():.3f}")
    bars.set(ylabel="average precision", ylim=(0, 1), xlabel="" if len(table) <= 60 else f"{len(table)} classes, best to worst")
    bars.legend()
    scatter.scatter(table.recordings, table.ap, s=12)
    scatter.set(xlabel="recordings of the class", ylabel="average precision", ylim=(0, 1), xscale="log")
    ticks = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if table.recordings.min() / 2 <= n <= 2 * table.recordings.max()]
    scatter.set_xticks(ticks, ticks)
    scatter.minorticks_off()
    save(figure, path)


def intervals(path: Path, panels: Sequence[tuple[str, Sequence[tuple[str, tuple[float, float, float], Sequence[float]]]]], heading: str, reference: str,
              foot: str) -> None:
    """Panels, four in a row, with the same lines from top to bottom: (name, (mean, low, high), single values), NaN where there is none;
    a dashed line through the one that the others are compared with. A line with fewer values than another one has a hollow mean, since
    the two are not over the same. A panel without a value is left out."""
    panels = [(title, points) for title, points in panels if np.isfinite([mean for _, (mean, *_), _ in points]).any()]
    names, columns = [name for name, *_ in panels[0][1]], min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3 + 2.8 * columns, 1.4 + rows * (0.6 + 0.3 * len(names))), layout="constrained")
    figure.suptitle(plain(heading, 200))
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, points) in zip(grid.flat, panels):
        value, low, high = np.array([estimate for _, estimate, _ in points], float).T
        fewer = [place for place, (*_, values) in enumerate(points) if len(values) < max(len(values) for *_, values in points)]
        for place, (*_, values) in enumerate(points):
            axes.plot(values, np.full(len(values), place), ".", color="C0", alpha=0.4, markersize=5)
        axes.errorbar(value, range(len(names)), xerr=np.nan_to_num([value - low, high - value]).clip(0), fmt="o", markersize=5, capsize=3)
        axes.plot(value[fewer], fewer, "o", color="C0", markerfacecolor="white", markersize=5, zorder=3)
        if reference in names and np.isfinite(value[names.index(reference)]):
            axes.axvline(value[names.index(reference)], color="0.5", linestyle="--", linewidth=1)
        axes.set_title(plain(title), fontsize=10)
        axes.grid(axis="x", alpha=0.3)
    grid[0, 0].set_yticks(range(len(names)), [plain(name) for name in names])
    grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(f"dashed: {plain(reference)}; {foot}", fontsize=9)
    save(figure, path)


def lines(path: Path, panels: Sequence[tuple[str, dict[str, Sequence[tuple[float, float, float, float]]]]], x_label: str, heading: str) -> None:
    """Panels side by side of lines with intervals: line -> (x, value, low, high)."""
    figure = Figure(figsize=(1 + 4.2 * len(panels), 4.4), layout="constrained")
    figure.suptitle(plain(heading, 200))
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for number, (name, points) in enumerate(curves.items()):
            x, value, low, high = np.array(points, float).T
            shifted = x * 1.03**number  # so that intervals do not hide each other
            axes.errorbar(shifted, value, yerr=np.nan_to_num([value - low, high - value]).clip(0), marker="o", markersize=4, capsize=3, label=plain(name, 40))
        ticks = sorted({point[0] for points in curves.values() for point in points})
        axes.set(title=plain(title), xscale="log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend(fontsize=8, framealpha=0.6)
    figure.supxlabel(x_label, fontsize=10)
    save(figure, path)


def timeline(path: Path, log_mel: np.ndarray, probabilities: np.ndarray, classes: Sequence[str], config: AudioConfig, *,
             row_seconds: float, heading: str, truth: np.ndarray | None = None, n_species: int = 10) -> None:
    """Spectrogram above, the most likely species' probabilities below, and known presences (rows, classes) as outlines."""
    interest = probabilities.max(axis=0) + (0 if truth is None else 2 * truth.max(axis=0))
    shown = np.argsort(-interest, kind="stable")[: min(n_species, len(classes))]
    seconds = len(probabilities) * row_seconds
    figure = Figure(figsize=(14, 3 + 0.28 * len(shown)), layout="constrained")
    figure.suptitle(plain(heading, 120))
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 0.28 * len(shown)))
    draw_spectrogram(top, log_mel, config, seconds)
    top.set_ylabel("Hz")
    per_column = -(-len(probabilities) // 1000)  # rows: hours show each stretch's highest, so that no short song is lost
    pooled = np.maximum.reduceat(probabilities[:, shown], np.arange(0, len(probabilities), per_column))
    seconds_pooled = len(pooled) * per_column * row_seconds  # the last column may reach over the end
    image = bottom.imshow(pooled.T, aspect="auto", cmap="Greens", vmin=0, vmax=1, interpolation="nearest",
                          extent=(0, seconds_pooled, len(shown) - 0.5, -0.5))
    if truth is not None:
        for line, species in enumerate(shown):
            for row in np.flatnonzero(truth[:, species] > 0.5):
                bottom.add_patch(Rectangle((row * row_seconds, line - 0.5), row_seconds, 1, fill=False, edgecolor="C3", linewidth=1.5))
        bottom.set_title("red outline: the species is there", fontsize=9, loc="left")
    bottom.set(xlabel="seconds", ylabel="species", xlim=(0, seconds), yticks=range(len(shown)))
    if seconds > 900:
        step = next((step for step in (300, 600, 1800, 3600, 7200) if seconds / step <= 14), 21_600)
        ticks = np.arange(0, seconds + 1, step)
        bottom.set(xlabel="hours:minutes", xticks=ticks, xticklabels=[f"{t // 3600:.0f}:{t % 3600 // 60:02.0f}" for t in ticks])
    bottom.set_yticklabels([plain(classes[species], 40) for species in shown], fontsize=8)
    # Beside the lower panel alone: both keep one width, so that their seconds stand above each other.
    figure.colorbar(image, cax=bottom.inset_axes((1.01, 0, 0.012, 1)), label="probability")
    save(figure, path)
