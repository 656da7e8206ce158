"""Scored soundscapes -> scores by signal-to-noise ratio, paired gains of the ways to make rows, and a picture of both."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.pooling import BASE, OPTIONS, Option, rows
from src import metrics, plots
from src.console import progress
from src.metrics import NAMES, Estimate, bootstrap_weights, estimate, mean_known

SHOWN = ("macro_ap", "padded_cmap", "macro_roc_auc")


@dataclass(frozen=True)
class Scored:
    """One composition at L ratios."""

    windows: np.ndarray  # (L, windows at pooling.window_starts, C) probabilities
    truth: np.ndarray  # (rows, C)
    events: int
    unusable: list[str]  # recordings in which no song stands out

    def rows(self, window_seconds: float, option: Option = BASE) -> np.ndarray:
        """(L, rows, C)"""
        return np.stack([rows(windows, len(self.truth), window_seconds, option) for windows in self.windows])


def score(truth: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """truth (S, rows, C), probability (S, L, rows, C), weights (S, R) -> each metric under each column of weights, (R,)."""
    n_soundscapes, n_ratios, n_rows, n_classes = probability.shape
    target = np.repeat(truth[:, None], n_ratios, axis=1).reshape(-1, n_classes)
    flat, weights = probability.reshape(-1, n_classes), np.repeat(weights, n_ratios * n_rows, axis=0)
    precision, auc = metrics.per_class(target, flat, weights)
    return {"macro_ap": mean_known(precision), "padded_cmap": metrics.padded_cmap(target, flat, weights), "macro_roc_auc": mean_known(auc)}


def signed(gain: Estimate) -> str:
    """Bold where the interval leaves out zero."""
    text = f"{gain.value:+.3f} ({gain.low:+.3f} to {gain.high:+.3f})"
    return f"**{text}**" if gain.low > 0 or gain.high < 0 else text


def chance(truth: np.ndarray) -> float:
    """Macro AP of a constant: the mean share of positive rows of the species that have any."""
    share = truth.reshape(-1, truth.shape[-1]).mean(axis=0)
    return float(share[share > 0].mean()) if share.any() else float("nan")


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    return ["", *("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])]


@dataclass(frozen=True)
class Results:
    by_snr: dict[float, dict[str, Estimate]]
    pooled: dict[str, Estimate]
    by_fold: dict[int, dict[str, float]]
    by_option: dict[Option, tuple[dict[str, Estimate], dict[str, Estimate]]]  # its scores, and its gains over the base
    chance: float


def measure(by_fold: dict[int, list[Scored]], snr_db: tuple[float, ...], window_seconds: float, resamples: int) -> Results:
    """All scores; folds are pooled, and each fold's soundscapes were scored by its own model."""
    all_scored = [scored for of_fold in by_fold.values() for scored in of_fold]
    fold_of = np.repeat(list(by_fold), [len(of_fold) for of_fold in by_fold.values()])
    truth, weights = np.stack([scored.truth for scored in all_scored]), bootstrap_weights(len(all_scored), resamples)
    by_option: dict[Option, tuple[dict, dict]] = {}
    base = np.stack([scored.rows(window_seconds) for scored in all_scored])  # (S, L, rows, C)
    values = base_values = score(truth, base, weights)
    for option in progress(OPTIONS, what="comparing", unit="option"):
        if option != BASE:
            values = score(truth, np.stack([scored.rows(window_seconds, option) for scored in all_scored]), weights)
        by_option[option] = ({name: estimate(values[name]) for name in SHOWN}, {name: estimate(values[name] - base_values[name], -1) for name in SHOWN})
    return Results(
        by_snr={snr: {name: estimate(v) for name, v in score(truth, base[:, [k]], weights).items()} for k, snr in enumerate(snr_db)},
        pooled=by_option[BASE][0], by_option=by_option, chance=chance(truth),
        by_fold={fold: {name: float(v[0]) for name, v in score(truth[fold_of == fold], base[fold_of == fold], weights[fold_of == fold, :1]).items()}
                 for fold in by_fold})


def draw(path: Path, results: Results, heading: str) -> None:
    """Macro AP and ROC-AUC by ratio, and the options' gains in macro AP, with 95 % intervals."""
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    figure.suptitle(heading)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    for axes, name, by_chance in ((left, "macro_ap", results.chance), (middle, "macro_roc_auc", 0.5)):
        of = [scores[name] for scores in results.by_snr.values()]
        axes.errorbar(list(results.by_snr), [e.value for e in of], yerr=errors(of), marker="o", capsize=4)
        axes.axhline(by_chance, color="0.6", linestyle="--", label=f"chance {by_chance:.3f}")
        axes.set(xlabel="signal-to-noise ratio of every song (dB)", ylabel=NAMES[name], title=f"{NAMES[name]}, {BASE}", xticks=list(results.by_snr))
        axes.legend(loc="lower right")
    left.set_ylim(bottom=0)
    options = [option for option in results.by_option if option != BASE]
    gains = [results.by_option[option][1]["macro_ap"] for option in options]
    right.errorbar([g.value for g in gains], range(len(gains)), xerr=errors(gains), fmt="o", capsize=4)
    right.axvline(0, color="0.6", linestyle="--")
    right.set_yticks(range(len(gains)), [str(option) for option in options])
    right.invert_yaxis()
    right.set(title=f"against {BASE}: all ratios pooled, paired", xlabel="difference in macro AP", ylabel="rows from")
    plots.save(figure, path)


def errors(of: list[Estimate]) -> np.ndarray:
    """(2, n) distances to the intervals' ends; 0 where there is none."""
    return np.nan_to_num(np.clip([[e.value - e.low for e in of], [e.high - e.value for e in of]], 0, None))


def markdown(results: Results, by_fold: dict[int, list[Scored]]) -> list[str]:
    names = [NAMES[name] for name in SHOWN]
    lines = ["", f"## By signal-to-noise ratio ({BASE})"]
    lines += table(["SNR (dB)", *names], [*([f"{snr:g}", *(str(scores[name]) for name in SHOWN)] for snr, scores in results.by_snr.items()),
                                          ["all, pooled", *(str(results.pooled[name]) for name in SHOWN)]])
    lines += ["", f"Macro AP of a constant: {results.chance:.3f}. Padded cmAP is comparable between equally many rows only: its five rows of ones weigh less "
              "in the pooled line than in one ratio's or one fold's."]
    lines += table(["fold, all ratios", *names], [[str(fold), *(f"{scores[name]:.3f}" for name in SHOWN)] for fold, scores in results.by_fold.items()])
    lines += ["", "## Hop, pooling, smoothing", "", f"Gains over the first line are paired: the same soundscapes, all ratios pooled, the same resamples. "
              f"Bold: the interval leaves out zero; with {len(OPTIONS) - 1} options compared, one may do so by chance. "
              "max: over the windows that overlap the row at least half as long as the best one; smoothed: 0.25, 0.5, 0.25 of the row before, "
              "the row and the row after."]
    lines += table(["rows from", "macro AP", *(f"gain in {name}" for name in names)],
                   [[str(option), str(scores["macro_ap"]), *(["–"] * 3 if option == BASE else [signed(gains[name]) for name in SHOWN])]
                    for option, (scores, gains) in results.by_option.items()])
    best = max(results.by_option, key=lambda option: results.by_option[option][0]["macro_ap"].value)
    unusable = sorted({name for of_fold in by_fold.values() for scored in of_fold for name in scored.unusable})
    return [*lines, "", f"Highest macro AP: {best}, chosen and measured on the same soundscapes. {len(unusable)} recordings were passed over, since no song "
            "stands out in them.", ""]
