"""ESC-50 and ESC-10 (Piczak 2015) -> BirdCLEF's layout, with their own folds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pandas as pd

from .console import UserError, progress, say
from .metadata import read_csv
from .storage import atomic


def prepare_esc(source: Path, out: Path, *, only_ten: bool) -> None:
    """`source`: a copy of the ESC-50 repository (meta/esc50.csv, audio/), or a folder with meta.csv and audio/.

    Writes `out`/train_metadata.csv, train_audio/<category>/ (links, or copies where links fail) and folds.csv: the
    data set's folds, numbered from 0. Clips cut from one original (src_file, freesound_id) share a fold there.
    Missing audio is counted and listed in missing.txt. Raises UserError where there is no table of the kind.
    """
    table_file = next((file for file in (source / "meta/esc50.csv", source / "meta.csv") if file.exists()), None)
    if table_file is None:
        raise UserError(f"{source} holds neither meta/esc50.csv nor meta.csv; it is no copy of https://github.com/karolpiczak/ESC-50")
    table = read_csv(table_file)
    absent = sorted({"filename", "fold", "category"} - set(table))
    if absent:
        raise UserError(f"{table_file}: missing column(s) {', '.join(absent)}; ESC-50's table has them")
    if only_ten and "esc10" in table:
        table = table[table.esc10 == "True"]
    there = table.filename.map(lambda name: (source / "audio" / name).is_file())
    missing, table = table.filename[~there], table[there]
    if table.empty:
        raise UserError(f"{source / 'audio'} holds none of the {len(missing)} clips of {table_file}")
    names = table.category + "/" + table.filename
    for category, name in zip(progress(table.category, what="linking", unit="clip"), table.filename):
        link_or_copy(source / "audio" / name, out / "train_audio" / category / name)
    metadata = pd.DataFrame({"primary_label": table.category, "secondary_labels": "[]", "author": table.get("author", ""), "filename": names})
    folds = pd.DataFrame({"filename": names, "fold": table.fold.astype(int) - table.fold.astype(int).min()})
    for file, content in (("train_metadata.csv", metadata), ("folds.csv", folds)):
        with atomic(out / file) as partial:
            content.to_csv(partial, index=False, lineterminator="\n")
    with atomic(out / "missing.txt") as partial:
        partial.write_text("".join(f"{name}\n" for name in missing))
    say(f"wrote {out}: {len(table)} clips of {table.category.nunique()} classes in {folds.fold.nunique()} folds; {len(missing)} missing (missing.txt)")


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system allows one (train_audio may hold no links that lead out of it), else a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and os.path.samefile(source, target):
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        with atomic(target) as partial:
            shutil.copyfile(source, partial)
