"""AudioSet's balanced training set and evaluation set (Gemmeke et al. 2017), https://research.google.com/audioset/download.html."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..console import UserError
from .clips import Clip, link_clips, read_rows
from .layout import DataSet, read_table

FORM = ("YTID", "start_seconds", "end_seconds", '"label,label"')  # the third header line
SPLITS = {"balanced_train_segments.csv": -1, "eval_segments.csv": 0}


def audioset(source: Path, out: Path) -> DataSet:
    """balanced_train_segments.csv, eval_segments.csv, class_labels_indices.csv, and the clips of 10 s that could be downloaded.

    A clip has several labels: the first is its primary one, the others its secondary ones, and all count alike (secondary_labels: hard).
    Labels are the ontology's ids (/m/09x0r), since the names hold commas; train_metadata.csv and taxonomy.csv give the names.
    The evaluation set is fold 0, the training set always in training, so that fold 0 is AudioSet's own protocol.
    """
    table = read_table(source / "class_labels_indices.csv", ("mid", "display_name"), "AudioSet's has index, mid and display_name")
    classes = dict(zip(table.mid, table.display_name))
    clips, rows, folds = [], [], []
    for file, fold in SPLITS.items():
        for line, (video, start, end, labels) in read_rows(source / file, FORM):
            first, *others = labels.split(",")
            unknown = [label for label in (first, *others) if label not in classes]
            if unknown:
                raise UserError(f"{source / file}, line {line}: label {unknown[0]!r} is not in class_labels_indices.csv; correct the line or delete it")
            clips.append(Clip(video, float(start), float(end)))
            rows.append({"primary_label": first, "secondary_labels": str(others), "common_name": classes[first]})
            folds.append(fold)
    return DataSet(pd.DataFrame(rows).assign(filename=link_clips(clips, source, out)), folds={"folds.csv": folds}, classes=classes,
                   cache={"window_seconds": 10.0}, train={"secondary_labels": "hard"})
