"""experiments.csv: one row a trained fold, small enough to be committed and to be carried from one machine to another."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from .console import UserError
from .metadata import read_csv
from .metrics import NAMES
from .storage import write_table

COLUMNS = ["data", "split", "key", "row", "noise", "seed", "fold", "held_out", "training", *NAMES, "parameters", "gmacs", "train_seconds", "device", "jobs",
           "network", "epochs", "input_side", "commit", "hits"]
TEXTS = {"data", "split", "key", "row", "noise", "device", "network", "commit", "hits"}
FLOATS = "%.6g"
SPEED = ["network", "windows_per_second", "threads", "device"]


def packed(hits: np.ndarray) -> str:
    """(n,) 0 or 1 (top-1 is right; 0 where a recording has no label) of the held-out recordings, sorted by name -> hexadecimal digits."""
    return np.packbits(hits > 0.5).tobytes().hex()


def unpacked(text: str, n: int) -> np.ndarray:
    """(n,) 0 or 1; NaN where nothing was kept."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=n).astype(float) if text else np.full(n, np.nan)


@dataclass(frozen=True)
class Cell:
    """What is trained once, whichever tables ask for it."""

    data: str
    key: str
    seed: int
    fold: int


def read_table(file: Path, columns: list[str]) -> pd.DataFrame:
    """A table of such a file, its numbers as numbers; empty where there is none yet. Raises UserError for another table."""
    if not file.exists():
        return pd.DataFrame(columns=columns)
    table = read_csv(file)
    if table.columns.tolist() != columns:
        raise UserError(f"{file} has other columns than {','.join(columns)}; move it away")
    try:
        return table.assign(**{name: pd.to_numeric(table[name]) for name in columns if name not in TEXTS})
    except ValueError as error:
        raise UserError(f"{file}: {error}; move it away, or delete the row") from error


def whole(row: pd.Series) -> bool:
    """Whether nothing of a row is missing, and its top-1 is that of its recordings, where they were kept."""
    if row.drop("hits").isna().any() or (row.drop("hits") == "").any():
        return False
    if not row.hits:
        return True
    n = int(row.held_out)
    try:
        return len(row.hits) == 2 * -(-n // 8) and abs(unpacked(row.hits, n).mean() - row.top1) < 1e-5
    except ValueError:  # no hexadecimal digits
        return False


class Results:
    """The file, read anew before every row that is added, and written whole.

    Raises UserError for a torn row, a cell that stands there twice, and scores of two splits under one name: means over them would mean nothing.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "experiments.csv"
        self.table = self.read()

    def read(self) -> pd.DataFrame:
        table = read_table(self.file, COLUMNS)
        for problem, rows in (("is not whole", ~table.apply(whole, axis=1).astype(bool) if len(table) else []),
                              ("stands there twice", table.duplicated(list(Cell.__dataclass_fields__))),
                              ("is of another split than the others", table.groupby("data").split.transform("first") != table.split)):
            if len(bad := table[rows]):
                raise UserError(f"{self.file}, line {bad.index[0] + 2}: the row {bad.row.iloc[0]}, {bad.data.iloc[0]}, seed {bad.seed.iloc[0]}, "
                                f"fold {bad.fold.iloc[0]} {problem}; delete it (it is trained again) or bring the file back")
        return table

    def add(self, row: dict) -> None:
        """A row takes the place of an earlier one of the same cell; what has come into the file meanwhile stays."""
        self.table = self.read()
        new = pd.DataFrame([row])[COLUMNS]
        same = (self.table[["data", "key", "seed", "fold"]] == new[["data", "key", "seed", "fold"]].iloc[0]).all(axis=1)
        table = pd.concat([self.table[~same], new], ignore_index=True) if len(self.table) else new
        write_table(self.file, table.sort_values(["data", "row", "key", "seed", "fold"]), float_format=FLOATS)
        self.table = self.read()  # as rounded there: a table drawn now is the one that is drawn from the file later

    def finished(self) -> set[Cell]:
        return {Cell(*values) for values in self.table[["data", "key", "seed", "fold"]].itertuples(index=False, name=None)}

    def check_split(self, data: str, split: str) -> None:
        """Raises UserError where the file holds scores on another split of a data set of this name: means over both would mean nothing."""
        other = set(self.table.split[self.table.data == data]) - {split}
        if other:
            raise UserError(f"{self.file} holds scores of another data set, split or audio recipe under the name {data}; "
                            "give the folder another name, or name another --results")

    def noisy(self) -> Collection[str]:
        """The data sets that some training mixed with background noise."""
        return set(self.table.data[self.table.noise == "True"])

    def of(self, data: str, key: str) -> pd.DataFrame:
        """A row's folds and seeds, by (seed, fold)."""
        return self.table[(self.table.data == data) & (self.table.key == key)].set_index(["seed", "fold"]).sort_index()
