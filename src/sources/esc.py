"""ESC-50 and its subset ESC-10 (Piczak 2015), https://github.com/karolpiczak/ESC-50: 5 s, the window's default."""

from __future__ import annotations

from pathlib import Path

from ..console import UserError
from .layout import DataSet, link, read_table


def esc(source: Path, out: Path, *, only_ten: bool) -> DataSet:
    """A copy of the repository (meta/esc50.csv, audio/), or a folder with meta.csv and audio/.

    Its own folds, numbered from 0, are kept: clips cut from one original lie in one fold there.
    """
    file = next((file for file in (source / "meta/esc50.csv", source / "meta.csv") if file.exists()), None)
    if file is None:
        raise UserError(f"{source} holds neither meta/esc50.csv nor meta.csv; it is no copy of https://github.com/karolpiczak/ESC-50")
    table = read_table(file, ("filename", "fold", "category"), "ESC-50's table has them")
    bad = ~table.fold.str.fullmatch(r"\d+")
    if bad.any():
        raise UserError(f"{file}, line {bad.idxmax() + 2}: fold {table.fold[bad].iloc[0]!r} is no number; correct the line or delete it")
    if only_ten and "esc10" in table:
        table = table[table.esc10.str.casefold() == "true"]  # a spreadsheet writes TRUE
    if only_ten and table.category.nunique() > 10:
        raise UserError(f"{file} has {table.category.nunique()} categories and no column esc10 that names ESC-10's; prepare it as esc50")
    if not (source / "audio").is_dir():
        raise UserError(f"{source} holds no folder audio; it is no copy of https://github.com/karolpiczak/ESC-50")
    link(source / "audio", out / "train_audio")
    folds = table.fold.astype(int)
    return DataSet(table.assign(primary_label=table.category, secondary_labels="[]"), folds={"folds.csv": folds - folds.min()})
