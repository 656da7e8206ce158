"""BirdCLEF's layout, which every stage reads: a data set in memory, its audio linked, and the files it is written to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from ..console import UserError, say
from ..metadata import read_csv
from ..storage import atomic_folder, write_table, write_text

COLUMNS = ("primary_label", "secondary_labels", "type", "latitude", "longitude", "scientific_name", "common_name", "author", "license", "rating",
           "url", "filename")  # BirdCLEF 2023's
FILES = ("train_metadata.csv", "train_audio", "folds.csv", "sample_submission.csv", "taxonomy.csv", "cache.yaml", "train.yaml", "missing_audio.csv")
MADE = "# made by python -m src.prepare; delete this line to keep what you change\n"
LEFT_OUT = -2  # in a fold table: neither trained on nor scored; -1: always in training


@dataclass(frozen=True)
class DataSet:
    """A data set but for its audio."""

    recordings: pd.DataFrame
    """Strings; columns that the layout has and this table has not are written empty, its own further ones are left out."""
    folds: dict[str, Sequence[int]] = field(default_factory=dict)
    """Established splits: a fold table's file name -> the fold of each recording."""
    classes: dict[str, str] = field(default_factory=dict)
    """Every class in the data set's own order -> its common name. Empty: the labels that occur, or a competition's own list."""
    cache: dict[str, Any] = field(default_factory=dict)
    """The audio recipe's settings that differ from the defaults; src.cache reads them from OUT/cache.yaml."""
    train: dict[str, Any] = field(default_factory=dict)
    """Training settings likewise; src.train reads them from OUT/train.yaml."""


def write(data: DataSet, out: Path) -> list[str]:
    """Writes what `data` holds below `out` and returns the recordings whose audio is not there (missing_audio.csv lists them)."""
    names = data.recordings.filename
    if not len(names):
        raise UserError(f"the source's tables name no recording for {out}; are they whole, and of this data set?")
    if names.duplicated().any():
        raise UserError(f"the source's tables name {names[names.duplicated()].iloc[0]} twice; delete one of the rows there")
    missing = [name for name in names if not (out / "train_audio" / name).exists()]
    if missing:
        write_table(out / "missing_audio.csv", pd.DataFrame({"filename": missing}))
    else:
        (out / "missing_audio.csv").unlink(missing_ok=True)
    for file, folds in data.folds.items():
        write_table(out / file, pd.DataFrame({"filename": names, "fold": list(folds)}))
    if data.classes:
        write_table(out / "sample_submission.csv", pd.DataFrame(columns=["row_id", *data.classes]))
        write_table(out / "taxonomy.csv", pd.DataFrame({"primary_label": list(data.classes), "common_name": list(data.classes.values())}))
    for file, settings in (("cache.yaml", data.cache), ("train.yaml", data.train)):
        if (out / file).exists() and not (out / file).read_bytes().startswith(MADE.encode()):
            say(f"{out / file} is kept as it is: src.prepare did not make it")
        elif settings:
            write_text(out / file, MADE + yaml.safe_dump(settings, sort_keys=False))
        else:  # of what lay here before
            (out / file).unlink(missing_ok=True)
    write_table(out / "train_metadata.csv", data.recordings.reindex(columns=list(COLUMNS), fill_value=""))  # last: where it lies, the data set is whole
    return missing


def read_table(file: Path, columns: Sequence[str], origin: str) -> pd.DataFrame:
    """A CSV as strings. Raises UserError where it lacks one of the columns; `origin` says what table has them."""
    table = read_csv(file)
    absent = [column for column in columns if column not in table]
    if absent:
        raise UserError(f"{file}: missing column(s) {', '.join(absent)}; {origin}")
    return table


def link(source: Path, target: Path) -> None:
    """Makes `target` a link to the folder `source`, or its copy where links cannot be made. What was copied before is kept."""
    if target.is_symlink():
        target.unlink()
    if target.exists():
        say(f"{target} is there already and is kept")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.symlink(source.resolve(), target, target_is_directory=True)
    except OSError:
        say(f"{target}: no links here, copying")
        with atomic_folder(target) as unfinished:
            shutil.copytree(source, unfinished, dirs_exist_ok=True)
