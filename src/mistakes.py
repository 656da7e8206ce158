"""What was taken for what out of fold: confused pairs, the worst mistakes, and the windows to look at beside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .cache import Cache
from .dataset import SCORED_SECONDS


def taken_for(truth: np.ndarray, probability: np.ndarray, primary: np.ndarray) -> np.ndarray:
    """(n,) the class each recording was taken for: its primary class where the likeliest one is any of its own, else the likeliest.

    truth (n, C) of 0/1, probability (n, C), primary (n,) the column of the primary label.
    """
    likeliest = probability.argmax(axis=1)
    return np.where(truth[np.arange(len(truth)), likeliest] > 0.5, primary, likeliest)


def confusion(primary: np.ndarray, taken: np.ndarray, n_classes: int) -> np.ndarray:
    """(C, C) recordings of class row that were taken for class column."""
    return np.bincount(primary * n_classes + taken, minlength=n_classes**2).reshape(n_classes, n_classes)


def confused_pairs(matrix: np.ndarray, classes: Sequence[str]) -> pd.DataFrame:
    """primary_label, taken_for, recordings, held_out (of the class), share: one row a pair that occurs, the most frequent first."""
    of, to = np.nonzero(matrix * ~np.eye(len(matrix), dtype=bool))
    names, held_out = np.array(classes, object), matrix.sum(axis=1)
    pairs = pd.DataFrame({"primary_label": names[of], "taken_for": names[to], "recordings": matrix[of, to], "held_out": held_out[of],
                          "share": matrix[of, to] / held_out[of]})
    return pairs.sort_values(["recordings", "share"], ascending=False, kind="stable", ignore_index=True)


def shown_classes(matrix: np.ndarray, most: int) -> np.ndarray:
    """Columns worth a place in a picture: all that occur where these are at most `most`, else those of the most confused pairs."""
    occurring = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    if len(occurring) <= most:
        return occurring
    pairs = confused_pairs(matrix, range(len(matrix)))
    return np.sort(pd.unique(pairs[["primary_label", "taken_for"]].to_numpy().ravel())[:most].astype(int))


def worst_mistakes(names: pd.Series, truth: np.ndarray, probability: np.ndarray, primary: np.ndarray) -> pd.DataFrame:
    """filename, true and wrong (columns), p_true, p_wrong: the recordings taken for a class not their own, worst first.

    The worst has the lowest probability of its primary class in proportion to that of the best wrong one.
    """
    taken = taken_for(truth, probability, primary)
    rows = np.flatnonzero(taken != primary)
    table = pd.DataFrame({"filename": names.to_numpy()[rows], "true": primary[rows], "wrong": taken[rows],
                          "p_true": probability[rows, primary[rows]], "p_wrong": probability[rows, taken[rows]]})
    ratio = table.p_true / table.p_wrong.clip(lower=np.finfo(float).tiny)
    return table.loc[ratio.sort_values(kind="stable").index].reset_index(drop=True)


def typical(column: int, names: pd.Series, taken: np.ndarray, probability: np.ndarray, primary: np.ndarray, cache: Cache) -> int | None:
    """The row of the cached recording of a class that was recognised with the median probability; None where none was recognised."""
    rows = np.flatnonzero((primary == column) & (taken == column) & names.isin(cache.names).to_numpy())
    return int(rows[np.argsort(probability[rows, column], kind="stable")[len(rows) // 2]]) if len(rows) else None


def loudest_window(cache: Cache, name: str) -> tuple[np.ndarray, float]:
    """The window of the highest mean level in what was scored of a recording: (n_mels, frames) dB, and its start in seconds.

    A recording shorter than a window is returned whole.
    """
    config = cache.config
    cells = cache.read(name, 0, round(SCORED_SECONDS * config.frames_per_second))
    n = min(config.window_frames, len(cells))
    level = np.concatenate([[0], np.cumsum(cells.sum(axis=1, dtype=np.int64))])
    start = int((level[n:] - level[:-n]).argmax())
    return cells[start : start + n].T * config.db_step + config.db_min, start / config.frames_per_second
