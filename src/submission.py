"""Rows, files and checks of a BirdCLEF submission: row_id = file stem + "_" + end second, then the species."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .console import UserError
from .metadata import read_csv
from .storage import atomic

ROW_SECONDS = 5.0
LARGEST = 1 - 2.0**-24  # the largest float32 under 1: the padded cmAP punishes a probability of exactly 1


def n_rows(seconds: float) -> int:
    """Rows of a soundscape: max(1, round(seconds / 5)); a last stretch under 2.5 s has none of its own."""
    return max(1, round(seconds / ROW_SECONDS))


def row_ids(stem: str, n: int) -> list[str]:
    return [f"{stem}_{round(ROW_SECONDS * (k + 1))}" for k in range(n)]


def window_starts(n: int, window_seconds: float, hop_seconds: float) -> np.ndarray:
    """Seconds at which windows start, so that together they cover `n` rows: 0, hop, 2 hop, ..."""
    uncovered = max(0.0, n * ROW_SECONDS - window_seconds)
    return np.arange(1 + int(np.ceil(uncovered / hop_seconds - 1e-9))) * hop_seconds


def rows_from_windows(probability: np.ndarray, starts: np.ndarray, window_seconds: float, n: int) -> np.ndarray:
    """(n_windows, C) -> (n, C): each row is its windows' mean, weighted by the seconds of overlap."""
    begin = np.arange(n)[:, None] * ROW_SECONDS
    overlap = np.minimum(begin + ROW_SECONDS, starts + window_seconds) - np.maximum(begin, starts)
    overlap = np.where(overlap > 1e-6, overlap, 0.0)  # (n, n_windows)
    return (overlap / overlap.sum(axis=1, keepdims=True) @ probability).astype(np.float32)


def columns_of_sample(sample: Path) -> tuple[str, ...]:
    """The species columns of a sample submission, in its order. Raises UserError where it is none."""
    try:
        with open(sample, encoding="utf-8-sig", newline="") as file:
            header = next(csv.reader(file), [])
    except OSError as error:
        raise UserError(f"{sample} is not readable: {error.strerror}") from error
    if header[:1] != ["row_id"] or len(header) < 2 or len(set(header)) < len(header):
        raise UserError(f"{sample} is no sample submission: its header must be row_id and the species, each once")
    return tuple(header[1:])


def write(path: Path, ids: Sequence[str], probability: np.ndarray, classes: Sequence[str]) -> None:
    """Writes (n, C) probabilities atomically, clipped to [0, 1 - 2^-24]. Raises UserError where one is not finite."""
    if not np.isfinite(probability).all():
        raise UserError(f"{path}: a probability is not finite; nothing was written")
    table = pd.DataFrame(np.clip(probability, 0.0, LARGEST), columns=list(classes))
    table.insert(0, "row_id", list(ids))
    with atomic(path) as partial:
        table.to_csv(partial, index=False, float_format="%.9g", lineterminator="\n")


def check(path: Path, *, classes: Sequence[str] | None = None, ids: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a submission, read as text; an empty list where it is valid."""
    try:
        table = read_csv(path)
    except UserError as error:
        return [str(error)]
    faults, columns = [], table.columns.tolist()
    if columns[:1] != ["row_id"]:
        return [f"the first column is {columns[0] if columns else 'missing'}, not row_id"]
    if classes is not None and columns[1:] != list(classes):
        missing, extra = sorted(set(classes) - set(columns)), sorted(set(columns[1:]) - set(classes))
        faults.append(f"the columns differ: missing {missing[:5]}, unexpected {extra[:5]}" if missing or extra
                      else "the columns are in another order than the sample's")
    if len(columns) < 2:
        faults.append("there is no species column")
    doubled = table.row_id[table.row_id.duplicated()]
    if len(doubled):
        faults.append(f"{len(doubled)} row_ids stand there twice, {doubled.iloc[0]} for one")
    if ids is not None:
        missing, extra = [i for i in ids if i not in set(table.row_id)], sorted(set(table.row_id) - set(ids))
        if missing or extra:
            faults.append(f"row_ids differ from the soundscapes': missing {len(missing)} ({missing[:2]}), unexpected {len(extra)} ({extra[:2]})")
    malformed = table.row_id[~table.row_id.str.fullmatch(r".+_[1-9]\d*")]
    if len(malformed):
        faults.append(f"row_id {malformed.iloc[0]!r} is not <file stem>_<end second>")
    for column in columns[1:]:
        values = pd.to_numeric(table[column], errors="coerce").to_numpy(float)
        bad = np.flatnonzero(~((values >= 0) & (values < 1)))  # NaN is neither
        if len(bad):
            faults.append(f"{len(bad)} value(s) of {column} outside [0, 1): {table[column].iloc[bad[0]]!r} in row {table.row_id.iloc[bad[0]]}")
        if len(faults) >= 10:
            break
    return faults
