"""padded cmAP, macro AP, macro ROC-AUC, LRAP and top-1, each with a bootstrap interval over the scored rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

NAMES = {"padded_cmap": "padded cmAP", "macro_ap": "macro AP", "macro_roc_auc": "macro ROC-AUC", "lrap": "LRAP", "top1": "top-1"}
PADDING_ROWS = 5  # BirdCLEF 2023's padded cmAP


@dataclass(frozen=True)
class Estimate:
    """A metric with its 95 % bootstrap interval; NaN where no row or class can be scored."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "–"
        return f"{self.value:.3f}" + ("" if np.isnan(self.low) else f" ({self.low:.3f} to {self.high:.3f})")


def per_class(target: np.ndarray, probability: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Average precision and ROC-AUC of every class under every column of row weights.

    target (n, C) of 0/1, probability (n, C), weights (n, R) (default: one column of ones) -> two arrays (C, R).
    Equal scores are one threshold, as in scikit-learn; NaN where a class has no positive (or, for the AUC, no negative).
    """
    n, n_classes = target.shape
    weights = np.ones((n, 1), np.float32) if weights is None else np.asarray(weights, np.float32)
    precision = np.full((n_classes, weights.shape[1]), np.nan)
    auc = precision.copy()
    total = weights.sum(axis=0, dtype=np.float64)
    for c in range(n_classes):
        positive = np.flatnonzero(target[:, c] > 0.5)
        if not len(positive):
            continue
        order = np.argsort(-probability[:, c], kind="stable")
        score = probability[order, c]
        # Only the thresholds at which there is a positive matter: [start, end) of each such group of equal scores.
        thresholds = np.unique(-probability[positive, c])
        start, end = np.searchsorted(-score, thresholds, "left"), np.searchsorted(-score, thresholds, "right")
        edges = np.unique(np.concatenate([[0], start, end]))
        sums = np.add.reduceat(weights[order], edges[edges < n], axis=0).astype(np.float64)
        before = np.concatenate([np.zeros((1, weights.shape[1])), np.cumsum(sums, axis=0)])  # weight ahead of each edge
        ahead, reached = before[np.searchsorted(edges, start)], before[np.searchsorted(edges, end)]
        hits = np.zeros((len(thresholds), weights.shape[1]))  # positive weight at each threshold
        np.add.at(hits, np.searchsorted(thresholds, -probability[positive, c]), weights[positive])
        hits_reached = np.cumsum(hits, axis=0)
        all_hits, negatives = hits_reached[-1], total - hits_reached[-1]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(reached > 0, hits_reached / reached, 0.0)  # precision at each threshold
            precision[c] = (hits * share).sum(axis=0) / all_hits
            tied = (reached - ahead) - hits
            below = negatives - (reached - hits_reached) + 0.5 * tied
            auc[c] = (hits * below).sum(axis=0) / (all_hits * negatives)
    return precision, auc


def padded_cmap(target: np.ndarray, probability: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """(R,) BirdCLEF 2023's metric: macro AP over all classes after five rows of ones in truth and prediction."""
    weights = np.ones((len(target), 1), np.float32) if weights is None else weights
    ones = np.ones((PADDING_ROWS, target.shape[1]))
    precision, _ = per_class(np.vstack([target, ones]), np.vstack([probability, ones]),
                             np.vstack([weights, np.ones((PADDING_ROWS, weights.shape[1]))]))
    return precision.mean(axis=0)


def top1(target: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """(n,) 1 where the highest probability is a positive; NaN for rows without a label."""
    hit = target[np.arange(len(target)), probability.argmax(axis=1)] > 0.5
    return np.where(target.max(axis=1, initial=0) > 0.5, hit.astype(float), np.nan)


def ranking_precision(target: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """(n,) label-ranking average precision of each row (its mean is scikit-learn's LRAP); NaN for rows without a label."""
    rank = rankdata(-probability, method="max", axis=1)
    values = np.full(len(target), np.nan)
    for row in np.flatnonzero(target.max(axis=1, initial=0) > 0.5):
        ranks = rank[row, target[row] > 0.5]
        values[row] = np.mean(rankdata(ranks, method="max") / ranks)
    return values


def bootstrap_weights(n: int, resamples: int, seed: int = 0) -> np.ndarray:
    """(n, 1 + resamples) how often each row is taken: all once, then drawn with replacement."""
    rng, weights = np.random.default_rng(seed), np.ones((n, 1 + resamples), np.float32)
    for column in range(1, 1 + resamples):
        weights[:, column] = np.bincount(rng.integers(n, size=n), minlength=n)
    return weights


def score(target: np.ndarray, probability: np.ndarray, *, resamples: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """All metrics of (n, C) probabilities against 0/1 targets, with 95 % intervals from `resamples` bootstraps of the rows.

    Macro AP and ROC-AUC run over the classes with a positive among the rows, padded cmAP over all classes,
    LRAP and top-1 over the rows with a label.
    """
    weights = bootstrap_weights(len(target), resamples, seed)
    precision, auc = per_class(target, probability, weights)
    return {
        "padded_cmap": estimate(padded_cmap(target, probability, weights)),
        "macro_ap": estimate(mean_known(precision)),
        "macro_roc_auc": estimate(mean_known(auc)),
        "lrap": estimate(_row_mean(ranking_precision(target, probability), weights)),
        "top1": estimate(_row_mean(top1(target, probability), weights)),
    }


def mean_known(values: np.ndarray) -> np.ndarray:
    """(C, R) -> (R,) the mean over the classes that are not NaN; NaN where none is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0).sum(axis=0) / known.sum(axis=0)


def _row_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return values[known] @ weights[known] / weights[known].sum(axis=0)


def estimate(values: np.ndarray, least: float = 0.0) -> Estimate:
    """The first value, with an interval from the others, its resamples, within [least, 1]."""
    resampled = values[1:][np.isfinite(values[1:])]
    if not len(resampled):
        return Estimate(float(values[0]), float("nan"), float("nan"))
    # Resampling repeats rows, which lifts an average precision a little: the spread is put around the value itself.
    low, high = np.clip(values[0] + np.percentile(resampled, [2.5, 97.5]) - resampled.mean(), least, 1)
    return Estimate(float(values[0]), float(low), float(high))


def mean_over(folds: Sequence[dict[str, Estimate]]) -> dict[str, tuple[Estimate, float]]:
    """Each metric's mean and standard deviation over the folds; the mean's interval takes the folds' errors as independent."""
    means = {}
    for name in folds[0]:
        value, low, high = np.array([(fold[name].value, fold[name].low, fold[name].high) for fold in folds]).T
        below, above = (np.sqrt((error**2).sum()) / len(folds) for error in (value - low, high - value))
        mean = Estimate(float(value.mean()), *np.clip([value.mean() - below, value.mean() + above], 0, 1).tolist())
        means[name] = mean, float(value.std(ddof=1)) if len(folds) > 1 else float("nan")
    return means


@dataclass(frozen=True)
class Reliability:
    """How often what was given a probability was true: one entry for each of equally wide bins from 0 to 1."""

    count: np.ndarray
    mean: np.ndarray  # probability of what is in the bin; NaN in an empty one
    share: np.ndarray  # of it that was true
    error: float  # the expected calibration error: the mean of |share - mean|, weighted by count (Naeini et al. 2015)


def reliability(true: np.ndarray, probability: np.ndarray, n_bins: int = 10) -> Reliability:
    """Of any number of predictions: true (n,) of 0/1, probability (n,) in [0, 1]."""
    place = np.minimum((probability * n_bins).astype(int), n_bins - 1)
    count = np.bincount(place, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        mean, share = (np.bincount(place, values, minlength=n_bins) / count for values in (probability, true))
    return Reliability(count, mean, share, float(np.nansum(count * np.abs(share - mean)) / count.sum()))
