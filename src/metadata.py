"""train_metadata.csv, taxonomy and sample submission -> one checked table of recordings and the ordered classes."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from .audio import DamagedAudio, read_header
from .console import UserError, progress, say

ARCHIVE_ID = r"(XC|iNat|CSA|ML)\d+"  # xeno-canto, iNaturalist, Colección de Sonidos Ambientales, Macaulay Library
UNKNOWN = ("unknown", "anonymous", "not specified", "n/a", "na", "none", "nan", "-", "?")  # recordists who are no one
REQUIRED = ("primary_label", "secondary_labels", "author", "filename")
SecondaryLabels = Literal["ignore", "mask", "soft", "hard"]


@dataclass(frozen=True)
class Metadata:
    """The recordings of one or several data folders.

    table, one row a recording: filename (the key), path (of the audio), primary_label, secondary_labels (tuple),
    author (empty where unknown), rating and duration_s (NaN where the table has none), recording_id (an archive's, or the filename), is_extra
    (from a further folder: always in training), copy_group (copies of one recording share a number).
    """

    table: pd.DataFrame
    classes: tuple[str, ...]


def read_csv(path: Path | str) -> pd.DataFrame:
    """A CSV as strings: the labels NA, null, 1e5 and 007 stay what they are."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # pandas' parser errors are ValueErrors
        raise UserError(f"{path} is not a readable CSV file: {error}") from error
    require_header(table, path)
    return table


def require_header(table: pd.DataFrame, path: Path | str) -> None:
    """Raises UserError where the rows are longer than the header: pandas then takes the first column for the rows' names."""
    if len(table) and not isinstance(table.index, pd.RangeIndex):
        raise UserError(f"{path}: its rows have more cells than its header has columns; is there a comma at their end, or one that needs quotes?")


def read_metadata(data: Sequence[Path | str], metadata: Path | str | None = None) -> Metadata:
    """Reads and checks the metadata of one or more folders in BirdCLEF's layout.

    `metadata` names another table in the same columns for the first folder. Copies of a recording in a further
    folder (copy_groups), and its recordings of other species, are left out; it may hold unlabelled recordings (an empty
    primary_label), which are trained on where there are soft labels for them. Raises UserError with the row and the remedy.
    """
    tables = []
    for number, folder in enumerate(map(Path, data)):
        file = Path(metadata) if metadata and number == 0 else folder / "train_metadata.csv"
        if not file.exists():
            raise UserError(f"{file} does not exist; input/README.md says where the data comes from and how to lay it out")
        table = _check(read_csv(file), file=file, audio=folder / "train_audio", unlabelled_allowed=number > 0)
        tables.append(table.assign(is_extra=number > 0))
        if number == 0:
            classes = _classes(table, file)
            unused = folder / "sample_submission.csv"
            if unused.exists() and not file.with_name(unused.name).exists():
                say(f"{unused} is not used, since it does not lie beside {file}, whose labels are the classes")
    main, table = tables[0], pd.concat(tables, ignore_index=True)
    if len(tables) > 1:
        table = with_durations(table, could_be_copies(table))
        groups = table.copy_group.to_numpy()
        copies = table.is_extra & (np.isin(groups, groups[: len(main)]) | pd.Series(groups).duplicated())
        unknown = table.is_extra & ~table.primary_label.isin([*classes, ""])
        say(f"further folders: {table.is_extra.sum()} recordings, less {copies.sum()} copies and "
            f"{(unknown & ~copies).sum()} of species that are not among the {len(classes)} classes")
        namesakes = table.filename[copies & table.filename.duplicated() & (table.recording_id == table.filename)]
        if len(namesakes):
            say(f"{len(namesakes)} of these copies, {namesakes.iloc[0]} for one, were known by their whole name alone; rename what is another recording")
        table = table[~(copies | unknown)].reset_index(drop=True)
    return Metadata(table.assign(copy_group=copy_groups(table)), classes)


def _check(raw: pd.DataFrame, *, file: Path, audio: Path, unlabelled_allowed: bool) -> pd.DataFrame:
    missing = [column for column in REQUIRED if column not in raw]
    if missing:
        hint = "its cells must be separated by commas, not semicolons" if ";" in raw.columns[0] else "BirdCLEF's train_metadata.csv has them"
        raise UserError(f"{file}: missing column(s) {', '.join(missing)}; {hint}")
    if raw.empty:
        raise UserError(f"{file}: no recordings")

    def refuse(bad: pd.Series, what: str, remedy: str) -> None:
        if bad.any():
            row = int(np.flatnonzero(bad)[0])
            more = f" (and {int(bad.sum()) - 1} more)" if bad.sum() > 1 else ""
            raise UserError(f"{file}, row {row + 2}: {what.format(**raw.iloc[row])}{more}; {remedy}")

    raw = raw.assign(primary_label=raw.primary_label.str.strip())
    labelled = raw.primary_label != ""
    refuse(~labelled & (not unlabelled_allowed), "no primary_label", "name the species or delete the row")
    refuse(raw.filename.str.strip() == "", "no filename", "is the table cut off?")
    refuse(raw.filename.duplicated(), "filename {filename} stands there twice", "delete one of the rows")
    refuse(~raw.filename.map(_stays_inside), "filename {filename} leaves the data folder",
           "use a path below train_audio, without .. and without a leading /")
    root = os.path.realpath(audio)
    refuse(raw.filename.map(lambda name: _links_out(audio, name, root)), "filename {filename} is a link out of the data folder",
           "copy the recording into train_audio")
    for taxonomy in sorted(file.parent.glob("eBird_Taxonomy_v*.csv")):
        codes = read_csv(taxonomy)
        if "SPECIES_CODE" not in codes:
            raise UserError(f"{taxonomy}: missing column SPECIES_CODE; it is not an eBird taxonomy")
        refuse(labelled & ~raw.primary_label.isin(set(codes.SPECIES_CODE)), "species {primary_label} is not in " + taxonomy.name,
               "correct the label, or move the taxonomy away if the labels are not eBird species codes")
    secondary = raw.secondary_labels.map(parse_list)
    refuse(secondary.isna(), "secondary_labels {secondary_labels} is not a list",
           "write it as BirdCLEF does, for example ['houspa', 'eurrob1'] or []")

    def number(column: str) -> pd.Series:
        return pd.to_numeric(raw[column], errors="coerce") if column in raw else pd.Series(np.nan, raw.index)

    return pd.DataFrame({
        "filename": raw.filename,
        "path": [str(audio / name) for name in raw.filename],
        "primary_label": raw.primary_label,
        "secondary_labels": secondary,
        "author": raw.author.str.strip().where(~raw.author.str.strip().str.casefold().isin(UNKNOWN), ""),
        "rating": number("rating"),
        "duration_s": number("duration_s"),
        "recording_id": raw.filename.map(recording_id),
    })


def recording_id(name: str) -> str:
    """An archive's number, under whatever folder; else the whole name, since many folders hold a 0001.wav."""
    stem = PurePosixPath(name).stem
    return stem if re.fullmatch(ARCHIVE_ID, stem) else name


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return bool(path.parts) and "\0" not in name and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def _links_out(audio: Path, name: str, root: str) -> bool:
    """Whether a link on the way from train_audio (which may itself be a link) leads out of it."""
    path = audio / name
    if not (path.is_symlink() or any((audio / parent).is_symlink() for parent in PurePosixPath(name).parents[:-1])):
        return False
    return not os.path.realpath(path).startswith(root + os.sep)


def parse_list(text: str) -> tuple[str, ...] | None:
    """"['a', 'b']" -> ("a", "b"), and "" -> (); None where it is no list."""
    if not text.strip():
        return ()
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return None
    return tuple(str(value).strip() for value in values) if isinstance(values, (list, tuple)) else None


def _classes(table: pd.DataFrame, file: Path) -> tuple[str, ...]:
    """The sample submission's columns, in its order, where one lies beside the table; else the sorted labels."""
    labels = sorted(table.primary_label.unique())
    sample = file.parent / "sample_submission.csv"
    if not sample.exists():
        return tuple(labels)
    columns = read_csv(sample).columns.tolist()
    if columns[:1] != ["row_id"]:
        raise UserError(f"{sample}: the first column is {columns[:1]}, not row_id; it is no sample submission")
    unknown = sorted(set(labels) - set(columns[1:]))
    if unknown:
        raise UserError(f"{file}: {len(unknown)} label(s) that are no column of {sample}: {', '.join(unknown[:5])}; "
                        "correct them, or move the sample submission away if it belongs to other classes")
    return tuple(columns[1:])


def copy_groups(table: pd.DataFrame) -> np.ndarray:
    """(n,) group numbers: recordings with the same id, or the same known author, species and duration, are copies.

    A duration that one in fifty recordings shares is one they were cut to, and says nothing.
    """
    same = table.groupby(["author", "primary_label", "duration_s"], dropna=False, sort=False).ngroup().to_numpy()
    cut = table.duration_s.map(table.duration_s.value_counts()) >= max(3, len(table) / 50)
    unknown = (table.author == "") | table.duration_s.isna() | cut
    return joined(table.recording_id, np.where(unknown, -1 - np.arange(len(table)), same))


def could_be_copies(table: pd.DataFrame) -> np.ndarray:
    """(n,) whether a recording and one of a further folder have the same known author and species: their durations tell copies."""
    pair = table.groupby(["author", "primary_label"], sort=False)
    return ((table.author != "") & pair.is_extra.transform("any") & (pair.filename.transform("size") > 1)).to_numpy()


def with_durations(table: pd.DataFrame, rows: np.ndarray | bool = True) -> pd.DataFrame:
    """Fills in duration_s (s) from the recordings' headers in the rows that lack it and whose audio is there; finds copies."""
    todo = table.path[table.duration_s.isna() & rows]
    todo = todo[todo.map(os.path.exists).astype(bool)]
    seconds = pd.Series(np.nan, todo.index)
    for row in progress(todo.index, what="reading durations", unit="file") if len(todo) else ():
        try:
            seconds[row] = read_header(todo[row]).seconds
        except DamagedAudio:  # the cache lists it
            continue
    table = table.assign(duration_s=table.duration_s.fillna(seconds))
    return table.assign(copy_group=copy_groups(table))


def joined(*keys: Sequence) -> np.ndarray:
    """(n,) group numbers: rows that share a value in any of the keys, directly or by way of others, are one group."""
    row = np.arange(len(keys[0]))
    first = []  # for each key, the first row of the same value
    for key in keys:
        _, index, inverse = np.unique(pd.factorize(np.asarray(key))[0], return_index=True, return_inverse=True)
        first.append(index[inverse])
    links = (np.ones(len(keys) * len(row), bool), (np.tile(row, len(keys)), np.concatenate(first)))
    return connected_components(coo_matrix(links, shape=(len(row), len(row))), directed=False)[1]


def targets(
    table: pd.DataFrame, classes: Sequence[str], secondary: SecondaryLabels = "ignore", soft: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """(n, n_classes) float32 targets, and the same shape of 0/1 weights (0: masked out of the loss).

    The primary label is always 1, also where it stands among its own secondary labels. A secondary label counts
    0 (ignore: the paper's choice), is masked, counts `soft`, or counts 1 (hard). Labels of no class are passed over.
    """
    column = {label: number for number, label in enumerate(classes)}
    target = np.zeros((len(table), len(classes)), np.float32)
    weight = np.ones_like(target)
    for row, labels in enumerate(table.secondary_labels):
        places = [column[label] for label in labels if label in column]
        if secondary == "mask":
            weight[row, places] = 0
        elif secondary != "ignore":
            target[row, places] = 1.0 if secondary == "hard" else soft
    labelled = np.flatnonzero(table.primary_label.isin(column))
    primary = (labelled, table.primary_label.iloc[labelled].map(column).to_numpy(int))
    target[primary], weight[primary] = 1, 1
    return target, weight
