"""STAGE 1: train_metadata.csv -> folds/<name>.csv (filename, fold; -1 = always in training, -2 = left out) and its audit."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from .console import UserError, say, stage
from .metadata import joined, read_csv, read_metadata, targets, with_durations
from .settings import parse
from .storage import write_text

STRATEGIES = ("multilabel", "author")


@dataclass(frozen=True)
class FoldSettings:
    data: tuple[Path, ...] = (Path("input/birdclef-2023"),)
    """Folders in BirdCLEF's layout; only the first is split, further ones are always in training."""
    out: Path | None = None
    """The fold table; its .audit.md and .audit.png are written beside it. By default folds/<name of the first data folder>.csv."""
    metadata: Path | None = None
    """Another table in train_metadata.csv's columns; duration_s is used where it has it."""
    strategy: Literal["multilabel", "author"] = "multilabel"
    """multilabel balances primary and secondary labels; author keeps each recordist on one side."""
    n_folds: int = 5
    seed: int = 0
    overwrite: bool = False
    """Replace an existing table of another split (trained runs rely on it)."""


def fold_table(data: Path) -> Path:
    """Where a data set's folds lie: named after its folder."""
    return Path("folds") / f"{data.absolute().name}.csv"


def assign_folds(table: pd.DataFrame, *, strategy: str, n_folds: int, seed: int) -> np.ndarray:
    """(n,) the fold in which each recording is held out, or -1: always in training.

    Copies of a recording stay together. Species with fewer recordings than folds are always in training, and with
    them their recordings' copies; so are species that would otherwise miss from some fold's training.
    """
    if not 2 <= n_folds <= len(table) or seed < 0:
        raise UserError(f"--n-folds {n_folds} must be between 2 and the number of recordings ({len(table)}), --seed {seed} not negative")
    counts = table.primary_label.map(table.primary_label.value_counts())
    rare = pd.Series((counts < n_folds).to_numpy()).groupby(table.copy_group.to_numpy()).transform("any").to_numpy()
    folds = np.full(len(table), -1)
    split = _by_labels if strategy == "multilabel" else _by_author
    if (~rare).any():
        folds[~rare] = split(table[~rare], n_folds, seed)
    # A species that one fold holds whole (one recordist's, or copies of one recording) would not be trained on there.
    whole = pd.Series(folds).groupby(table.primary_label.to_numpy()).transform("nunique").to_numpy() == 1
    in_group = pd.Series(whole).groupby(table.copy_group.to_numpy()).transform("any").to_numpy()
    folds[in_group] = -1
    if (folds == -1).all():
        raise UserError(f"--n-folds {n_folds}: no species has recordings for so many folds, so that nothing would be held out; name fewer folds")
    return folds


def _by_labels(table: pd.DataFrame, n_folds: int, seed: int) -> np.ndarray:
    """MultilabelStratifiedKFold (iterative-stratification) over one representative of each group of copies."""
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold

    classes = sorted(table.primary_label.unique())
    labels, _ = targets(table, classes, "hard")
    groups, representative, group_of = np.unique(table.copy_group, return_index=True, return_inverse=True)
    if len(groups) < n_folds:
        raise UserError(f"--n-folds {n_folds}: there are only {len(groups)} recordings that are no copies of each other; name fewer folds")
    of_group = np.zeros((len(groups), len(classes)), np.float32)
    np.maximum.at(of_group, group_of, labels)
    order = np.argsort(representative)  # in the order of the metadata, whatever the numbers of the groups
    fold_of_group = np.empty(len(groups), int)
    splitter = MultilabelStratifiedKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    columns = of_group[order].astype(int) if len(classes) > 1 else np.tile(of_group[order].astype(int), 2)  # it refuses a single one
    for fold, (_, held_out) in enumerate(splitter.split(order, columns)):
        fold_of_group[order[held_out]] = fold
    return fold_of_group[group_of]


def _by_author(table: pd.DataFrame, n_folds: int, seed: int) -> np.ndarray:
    """StratifiedGroupKFold (scikit-learn) over the primary label; groups join a recordist's recordings and copies."""
    from sklearn.model_selection import StratifiedGroupKFold

    # An unknown recordist is nobody's second recording: such a recording is a group of its own.
    recordist = np.where(table.author == "", "\0" + table.filename, table.author)
    groups = joined(recordist, table.copy_group)
    if groups.max() + 1 < n_folds:
        raise UserError(f"--n-folds {n_folds}: there are recordings of only {groups.max() + 1} recordists to tell apart; name fewer folds")
    folds = np.empty(len(table), int)
    splitter = StratifiedGroupKFold(n_splits=n_folds, shuffle=True, random_state=seed)
    for fold, (_, held_out) in enumerate(splitter.split(table, table.primary_label, groups)):
        folds[held_out] = fold
    return folds


def read_folds(file: Path | str) -> dict[str, int]:
    """filename -> fold; -1: always in training, -2: neither trained on nor scored. Raises UserError for a table of another form."""
    if not Path(file).exists():
        raise UserError(f"{file} does not exist; make it with python -m src.folds --data <the data> --out {file}")
    table = read_csv(file)
    if table.columns.tolist() != ["filename", "fold"] or not table.fold.str.fullmatch(r"-1|-2|\d+").all():
        raise UserError(f"{file}: not a fold table with the columns filename,fold; make it with python -m src.folds")
    if table.filename.duplicated().any():
        raise UserError(f"{file}: {table.filename[table.filename.duplicated()].iloc[0]} stands there twice")
    return dict(zip(table.filename, table.fold.astype(int)))


@stage
def main(argv: list[str] | None = None) -> None:
    from .folds_audit import write_audit

    settings = parse(FoldSettings, argv, prog="python -m src.folds", description=__doc__)
    out = settings.out or fold_table(settings.data[0])
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; name the table to write, {out / 'folds.csv'} for one")
    metadata = read_metadata(settings.data[:1], settings.metadata)
    say(f"{len(metadata.table)} recordings, {len(metadata.classes)} classes, {settings.n_folds} folds by {settings.strategy}")
    table = with_durations(metadata.table)
    by_strategy = {}
    for strategy in STRATEGIES:
        try:
            by_strategy[strategy] = assign_folds(table, strategy=strategy, n_folds=settings.n_folds, seed=settings.seed)
        except UserError as error:
            if strategy == settings.strategy:
                raise
            say(f"the audit lacks the strategy {strategy}: {error}")
    text = pd.DataFrame({"filename": table.filename, "fold": by_strategy[settings.strategy]}).to_csv(
        index=False, lineterminator="\n")
    if out.exists() and out.read_bytes() != text.encode() and not settings.overwrite:
        raise UserError(f"{out} holds another split, which trained runs may rely on; "
                        "name another --out, or replace it with --overwrite")
    write_text(out, text)
    established = settings.data[0] / "folds.csv"
    if established.exists() and out.resolve() != established.resolve():
        say(f"mind that src.train takes {established} unless --folds {out} is named")
    audit = write_audit(table, by_strategy, chosen=settings.strategy, n_folds=settings.n_folds, out=out)
    say(f"wrote {out}, {', '.join(map(str, audit))}")


if __name__ == "__main__":
    sys.exit(main())
