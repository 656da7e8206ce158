"""One year of BirdCLEF, as the competition publishes it."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from ..competitions import Competition
from ..console import UserError
from ..metadata import parse_list
from ..storage import atomic, write_table
from .layout import DataSet, link, read_table

AUDIO = ("train_audio", "test_soundscapes", "train_soundscapes", "unlabeled_soundscapes")  # the last two: some years


def birdclef(source: Path, out: Path, *, year: Competition) -> DataSet:
    """One year's files, audio linked; taxonomy and sample submission are copied, labelled soundscapes become row_id and labels."""
    recordings = read_table(source / year.metadata, ("primary_label", "filename"), f"is {source} the right competition's folder?")
    secondary = recordings.get("secondary_labels", pd.Series("", recordings.index)).map(_without_empty)
    if year.soundscape_labels and (source / year.soundscape_labels).exists():
        write_table(out / "soundscape_labels.csv", soundscape_labels(source / year.soundscape_labels))
    for name in ("sample_submission.csv", year.taxonomy):
        if (source / name).exists():
            with atomic(out / name) as unfinished:
                shutil.copyfile(source / name, unfinished)
    for name in AUDIO:
        if (source / name).is_dir():
            link(source / name, out / name)
    return DataSet(recordings.assign(secondary_labels=secondary))


def _without_empty(text: str) -> str:
    """"['']", as 2025 and 2026 say that there is none, becomes "[]"; what is no list is left for `read_metadata` to refuse."""
    labels = parse_list(text)
    return text if labels is None else str([label for label in labels if label])


def soundscape_labels(file: Path) -> pd.DataFrame:
    """Labelled stretches (filename, end, labels with ";") -> row_id and labels, as `src.evaluate --labels` reads them."""
    table = read_table(file, ("filename", "end", "primary_label"), "BirdCLEF 2026's has filename, start, end and primary_label")
    try:
        ends = table.end.map(_seconds).map(round)
    except (ValueError, OverflowError) as error:  # the latter: infinity
        raise UserError(f"{file}: {error}; the column end holds seconds or hours:minutes:seconds") from error
    for line, (name, end) in enumerate(zip(table.filename, ends), start=2):
        if end < 1 or not PurePosixPath(name).stem:
            raise UserError(f"{file}, line {line}: filename {name!r}, end {end}; a stretch has a recording and ends behind its begin")
    rows = [f"{PurePosixPath(name).stem}_{end}" for name, end in zip(table.filename, ends)]
    labels = table.primary_label.str.replace(";", " ").str.split()
    united = labels.groupby(np.array(rows), sort=False).agg(lambda lists: " ".join(dict.fromkeys(label for row in lists for label in row)))
    return pd.DataFrame({"row_id": united.index, "labels": united.to_numpy()})


def _seconds(text: str) -> float:
    """"00:01:05", "1:05" or "65" -> 65.0"""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds
