"""A data set as it is published -> the layout that every stage reads: train_metadata.csv, train_audio/, test_soundscapes/."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from .competitions import COMPETITIONS, Competition
from .console import UserError, say, stage
from .metadata import parse_list, read_csv
from .storage import atomic

COLUMNS = ("primary_label", "secondary_labels", "type", "latitude", "longitude", "scientific_name", "common_name", "author", "license", "rating",
           "url", "filename")  # BirdCLEF 2023's
AUDIO = ("train_audio", "test_soundscapes", "train_soundscapes", "unlabeled_soundscapes")  # the last two: some years


def birdclef(source: Path, out: Path, year: Competition) -> pd.DataFrame:
    """One year's files; returns the recordings. Columns that the year has not are empty, its own further ones are left out."""
    recordings = read_csv(source / year.metadata)
    absent = [column for column in ("primary_label", "filename") if column not in recordings]
    if absent:
        raise UserError(f"{source / year.metadata}: missing column(s) {', '.join(absent)}; is {source} the right competition's folder?")
    recordings = recordings.reindex(columns=list(COLUMNS), fill_value="")
    recordings["secondary_labels"] = recordings.secondary_labels.map(_without_empty)
    if year.soundscape_labels and (source / year.soundscape_labels).exists():
        write_table(soundscape_labels(source / year.soundscape_labels), out / "soundscape_labels.csv")
    for name in ("sample_submission.csv", year.taxonomy):
        if (source / name).exists():
            with atomic(out / name) as unfinished:
                shutil.copyfile(source / name, unfinished)
    for name in AUDIO:
        if (source / name).is_dir():
            link(source / name, out / name)
    return recordings


def esc(source: Path, out: Path, *, only_ten: bool) -> pd.DataFrame:
    """ESC-50 or ESC-10 (Piczak 2015): a copy of its repository (meta/esc50.csv, audio/), or a folder with meta.csv and audio/.

    Its own folds, numbered from 0, go to `out`/folds.csv: clips cut from one original lie in one fold there.
    """
    file = next((file for file in (source / "meta/esc50.csv", source / "meta.csv") if file.exists()), None)
    if file is None:
        raise UserError(f"{source} holds neither meta/esc50.csv nor meta.csv; it is no copy of https://github.com/karolpiczak/ESC-50")
    table = read_csv(file)
    absent = [column for column in ("filename", "fold", "category") if column not in table]
    if absent:
        raise UserError(f"{file}: missing column(s) {', '.join(absent)}; ESC-50's table has them")
    if only_ten and "esc10" in table:
        table = table[table.esc10 == "True"]
    write_table(pd.DataFrame({"filename": table.filename, "fold": table.fold.astype(int) - table.fold.astype(int).min()}), out / "folds.csv")
    link(source / "audio", out / "train_audio")
    table = table.assign(primary_label=table.category, secondary_labels="[]")
    return table.reindex(columns=list(COLUMNS), fill_value="")


def _without_empty(text: str) -> str:
    """"['']", as 2025 and 2026 say that there is none, becomes "[]"; what is no list is left for `read_metadata` to refuse."""
    labels = parse_list(text)
    return text if labels is None else str([label for label in labels if label])


def soundscape_labels(file: Path) -> pd.DataFrame:
    """Labelled stretches (filename, end, labels with ";") -> row_id and labels, as `src.evaluate --labels` reads them."""
    table = read_csv(file)
    absent = [column for column in ("filename", "end", "primary_label") if column not in table]
    if absent:
        raise UserError(f"{file}: missing column(s) {', '.join(absent)}; BirdCLEF 2026's has filename, start, end and primary_label")
    try:
        ends = table.end.map(_seconds)
    except ValueError as error:
        raise UserError(f"{file}: {error}; the column end holds seconds or hours:minutes:seconds") from error
    rows = [f"{PurePosixPath(name).stem}_{round(end)}" for name, end in zip(table.filename, ends)]
    labels = table.primary_label.str.replace(";", " ").str.split()
    united = labels.groupby(np.array(rows), sort=False).agg(lambda lists: " ".join(dict.fromkeys(label for row in lists for label in row)))
    return pd.DataFrame({"row_id": united.index, "labels": united.to_numpy()})


def _seconds(text: str) -> float:
    """"00:01:05", "1:05" or "65" -> 65.0"""
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


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
        unfinished = target.with_name(target.name + ".partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        say(f"{target}: no links here, copying")
        shutil.copytree(source, unfinished)
        os.replace(unfinished, target)


def write_table(table: pd.DataFrame, path: Path) -> None:
    with atomic(path) as unfinished:
        table.to_csv(unfinished, index=False, lineterminator="\n")


# name -> reads SOURCE, writes everything but the metadata below OUT, and returns the recordings in COLUMNS
SOURCES: dict[str, Callable[[Path, Path], pd.DataFrame]] = {
    name: lambda source, out, year=year: birdclef(source, out, year) for name, year in COMPETITIONS.items()
} | {"esc50": partial(esc, only_ten=False), "esc10": partial(esc, only_ten=True)}


@stage
def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m src.prepare", description=__doc__)
    options.add_argument("name", choices=list(SOURCES), metavar="NAME", help=", ".join(SOURCES))
    options.add_argument("source", type=Path, metavar="SOURCE", help="folder of the data set as it was downloaded and unpacked")
    options.add_argument("--out", type=Path, help="(default: input/<NAME>)")
    options = options.parse_args(argv)
    out = options.out or Path("input") / options.name
    if not options.source.is_dir():
        raise UserError(f"{options.source} is no folder; unpack the data set first")
    if out.resolve() == options.source.resolve():
        raise UserError(f"{out} is the source itself; name another --out")
    recordings = SOURCES[options.name](options.source, out)
    missing = recordings[[not (out / "train_audio" / name).exists() for name in recordings.filename]]
    if len(missing):
        write_table(missing[["filename"]], out / "missing_audio.csv")
        say(f"{len(missing)} of {len(recordings)} recordings are not there, listed in {out / 'missing_audio.csv'}; the cache will leave them out")
    else:
        (out / "missing_audio.csv").unlink(missing_ok=True)
    write_table(recordings, out / "train_metadata.csv")  # last: where it lies, the data set is whole
    split = f"its folds are {out / 'folds.csv'}" if (out / "folds.csv").exists() else f"next: python -m src.folds --data {out} --out folds/{options.name}.csv"
    say(f"wrote {out}: {len(recordings)} recordings of {recordings.primary_label.nunique()} classes; {split}")


if __name__ == "__main__":
    sys.exit(main())
