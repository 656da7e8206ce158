"""Rows, files and checks of a BirdCLEF submission: row_id = file stem + "_" + end second, then the species."""

from __future__ import annotations

import csv
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .console import UserError
from .metadata import read_csv, require_header
from .storage import atomic

ROW_SECONDS, SHORTEST_REST = 5.0, 0.5
POOLINGS = ("mean", "max")
WRITE_EVERY = 10.0  # seconds between interim submissions, at least
LARGEST = 1 - 2.0**-24  # the largest float32 under 1: the padded cmAP punishes a probability of exactly 1


def n_rows(seconds: float, *, to_the_end: bool = False) -> int:
    """Rows of a soundscape: seconds / 5, rounded and at least 1, so that a last stretch under 2.5 s has none of its own; `to_the_end`: from half a second on
    it has one."""
    return max(1, math.ceil((seconds - SHORTEST_REST) / ROW_SECONDS) if to_the_end else math.floor(seconds / ROW_SECONDS + 0.5))


def row_ids(name: str, n: int) -> list[str]:
    return [f"{name}_{round(ROW_SECONDS * (k + 1))}" for k in range(n)]


def window_starts(n: int, window_seconds: float, hop_seconds: float) -> np.ndarray:
    """Seconds at which windows start, so that together they cover `n` rows: 0, hop, 2 hop, ..."""
    uncovered = max(0.0, n * ROW_SECONDS - window_seconds)
    return np.arange(1 + int(np.ceil(uncovered / hop_seconds - 1e-9))) * hop_seconds


def rows_from_windows(probability: np.ndarray, starts: np.ndarray, window_seconds: float, n: int, pooling: str = "mean") -> np.ndarray:
    """(k, C) of the first k windows -> (n, C): each row is its windows' mean, weighted by the seconds of overlap; or (max) the highest of
    those windows that overlap it at least half as long as the longest one.

    A window with a number that is not finite is none. Rows that none of them reaches are NaN. A hundred rows at a time, so that hours need
    no n x k table.
    """
    finite = np.isfinite(probability).all(axis=1)
    rows, starts, probability = np.full((n, probability.shape[1]), np.nan, np.float32), starts[: len(probability)][finite], probability[finite]
    for first in range(0, n, 100):
        begin = np.arange(first, min(first + 100, n))[:, None] * ROW_SECONDS
        near = slice(*np.searchsorted(starts, [begin[0, 0] - window_seconds, begin[-1, 0] + ROW_SECONDS]))
        overlap = np.minimum(begin + ROW_SECONDS, starts[near] + window_seconds) - np.maximum(begin, starts[near])
        overlap = np.where(overlap > 1e-6, overlap, 0.0)  # (<= 100, windows near them)
        reached = overlap.any(axis=1)
        overlap = overlap[reached]
        if pooling == "max":
            pooled = np.array([probability[near][chosen].max(axis=0) for chosen in overlap >= overlap.max(axis=1, keepdims=True, initial=0) / 2])
        else:
            pooled = overlap / overlap.sum(axis=1, keepdims=True) @ probability[near]
        rows[first : first + 100][reached] = pooled.reshape(-1, rows.shape[1])
    return rows


def _header(path: Path) -> list[str]:
    """A CSV's first line, as it stands there: pandas renames a column that stands there twice. Raises UserError."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return next(csv.reader(file), [])
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is not readable: {getattr(error, 'strerror', None) or error}") from error


def _parts(path: Path) -> Iterator[pd.DataFrame]:
    """A CSV as strings, a thousand rows at a time: the millions of a whole competition's would take more memory than scoring. Raises UserError."""
    try:
        with pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig", chunksize=1000) as parts:
            for part in parts:
                require_header(part, path)
                yield part
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path} is not a readable CSV file: {error}") from error


def columns_of_sample(sample: Path) -> tuple[str, ...]:
    """The species columns of a submission or a sample, in its order. Raises UserError where it is none."""
    header = _header(sample)
    if header[:1] != ["row_id"] or len(header) < 2 or len(set(header)) < len(header):
        raise UserError(f"{sample} is no submission: its header must be row_id and the species, each once")
    return tuple(header[1:])


def read_rows(path: Path) -> pd.DataFrame:
    """A submission's probabilities, (rows, species), by row_id. Raises UserError where a row stands there twice or a value is no finite number."""
    columns_of_sample(path)
    table = read_csv(path).set_index("row_id")
    doubled = table.index[table.index.duplicated()]
    if len(doubled):
        raise UserError(f"{path}: {len(doubled)} row_ids stand there twice, {doubled[0]} for one")
    try:
        table = table.astype(float)
    except ValueError as error:
        raise UserError(f"{path}: {error}; check it with python -m src.infer --check {path}") from error
    if not np.isfinite(table.to_numpy()).all():
        raise UserError(f"{path} holds a value that is not finite; check it with python -m src.infer --check {path}")
    return table


def read_labels(path: Path) -> dict[str, list[str]]:
    """row_id -> labels, of a CSV with the columns row_id and labels (between them blanks or semicolons). A row may stand on several lines."""
    table = read_csv(path)
    if not {"row_id", "labels"} <= set(table.columns):
        raise UserError(f"{path} needs the columns row_id and labels")
    found: dict[str, list[str]] = {}
    for row, labels in zip(table.row_id, table.labels.str.replace(";", " ").str.split()):
        found.setdefault(row, []).extend(labels)
    return found


def _text(ids: Sequence[str], probability: np.ndarray, path: Path) -> str:
    """CSV lines of (n, C) probabilities, clipped to [0, 1 - 2^-24]. Raises UserError where one is not finite."""
    if not np.isfinite(probability).all():
        raise UserError(f"{path}: a probability is not finite; nothing was written")
    line = ",".join(["%.9g"] * probability.shape[1])
    values = np.clip(probability, 0.0, LARGEST).tolist()
    return "".join(f"{_cell(row)},{line % tuple(row_values)}\n" for row, row_values in zip(ids, values))


def _cell(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if any(mark in text for mark in ',"\r\n') else text


class SubmissionFile:
    """A submission that is complete whenever it is written: soundscapes that are not scored yet hold the prior."""

    def __init__(self, path: Path, soundscapes: Sequence[tuple[str, int]], classes: Sequence[str], prior: np.ndarray) -> None:
        self.path, self.soundscapes, self.classes = path, soundscapes, classes  # soundscapes: names and numbers of rows
        self.header = ",".join(map(_cell, ["row_id", *classes])) + "\n"
        self.texts = [_text(row_ids(name, n), np.tile(prior, (n, 1)), path) for name, n in soundscapes]

    def fill(self, number: int, probability: np.ndarray) -> None:
        """A soundscape's rows, (n, C)."""
        self.texts[number] = _text(row_ids(*self.soundscapes[number]), probability, self.path)

    def write(self) -> None:
        began = time.monotonic()
        with atomic(self.path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
            file.write(self.header)
            file.writelines(self.texts)
        now = time.monotonic()
        self.due = now + max(WRITE_EVERY, 20 * (now - began))  # writing takes at most a twentieth of the time

    def write_if_due(self) -> None:
        if time.monotonic() > self.due:
            self.write()

    def write_and_check(self) -> list[str]:
        """Writes it and reads it back: what is wrong with it."""
        self.write()
        return check(self.path, classes=self.classes, ids=[row for name, n in self.soundscapes for row in row_ids(name, n)])


def check(path: Path, *, classes: Sequence[str] | None = None, ids: Sequence[str] | None = None) -> list[str]:
    """What is wrong with a submission, read as text; an empty list where it is valid."""
    try:
        columns = _header(path)
        if columns[:1] != ["row_id"]:
            return [f"the first column is {columns[0] if columns else 'missing'}, not row_id"]
        doubled = [column for column, times in Counter(columns).items() if times > 1]
        if "" in columns:
            return ["a column has no name"]
        if doubled:
            return [f"{len(doubled)} column(s) stand there twice, {doubled[0]} for one"]
        row_id, outside = _read(path, columns)
    except UserError as error:
        return [str(error)]
    faults = []
    if classes is not None and columns[1:] != list(classes):
        missing, extra = sorted(set(classes) - set(columns)), sorted(set(columns[1:]) - set(classes))
        faults.append(f"the columns differ: missing {missing[:5]}, unexpected {extra[:5]}" if missing or extra
                      else "the columns are in another order than the sample's")
    if len(columns) < 2:
        faults.append("there is no species column")
    doubled = row_id[row_id.duplicated()]
    if len(doubled):
        faults.append(f"{len(doubled)} row_ids stand there twice, {doubled.iloc[0]} for one")
    if ids is not None:
        written = set(row_id)
        missing, extra = [row for row in ids if row not in written], sorted(written - set(ids))
        if missing or extra:
            faults.append(f"row_ids differ from the soundscapes': missing {len(missing)} ({missing[:2]}), unexpected {len(extra)} ({extra[:2]})")
    malformed = row_id[~row_id.str.fullmatch(r".+_[1-9]\d*", flags=re.DOTALL)]
    if len(malformed):
        faults.append(f"row_id {malformed.iloc[0]!r} is not <file stem>_<end second>")
    faults += [f"{n} value(s) of {column} outside [0, 1): {first}" for column, (n, first) in sorted(outside.items(), key=lambda item: columns.index(item[0]))]
    return faults[:10]


def _read(path: Path, columns: list[str]) -> tuple[pd.Series, dict[str, tuple[int, str]]]:
    """A submission's row_ids; and of each column with values that are not within [0, 1), their number and where the first one stands."""
    ids, outside = [], {}
    for part in _parts(path):
        ids.append(part.iloc[:, 0])
        for place, column in enumerate(columns[1:], start=1):
            values = pd.to_numeric(part.iloc[:, place], errors="coerce").to_numpy(float)
            bad = np.flatnonzero(~((values >= 0) & (values < 1)))  # NaN is neither
            if len(bad):
                n, first = outside.get(column, (0, f"{part.iloc[bad[0], place]!r} in row {part.iloc[bad[0], 0]}"))
                outside[column] = n + len(bad), first
    return pd.concat(ids), outside
