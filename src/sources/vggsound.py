"""VGGSound (Chen et al. 2020), https://www.robots.ox.ac.uk/~vgg/data/vggsound/."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from ..console import UserError
from .clips import Clip, link_clips, read_rows
from .layout import DataSet

FORM = ("id", "start_seconds", '"label"', "train or test")
SPLITS = {"train": -1, "test": 0}


def vggsound(source: Path, out: Path) -> DataSet:
    """vggsound.csv, and the clips of 10 s that could be downloaded, of one label each; the classes are sorted by name.

    Its labels hold commas and blanks ("engine accelerating, revving, vroom"): the primary label is engine_accelerating_revving_vroom.
    The test set is fold 0, the training set always in training.
    """
    clips, names, folds = [], [], []
    for line, (video, start, name, split) in read_rows(source / "vggsound.csv", FORM):
        if split not in SPLITS or not label_of(name):
            raise UserError(f"{source / 'vggsound.csv'}, line {line}: {name!r}, {split!r} is no label in train or test; correct the line or delete it")
        clips.append(Clip(video, float(start), float(start) + 10))
        names.append(name)
        folds.append(SPLITS[split])
    classes = {label_of(name): name for name in sorted(set(names))}
    if len(classes) < len(set(names)):
        alike = next(name for name in set(names) if classes[label_of(name)] != name)
        raise UserError(f"{source / 'vggsound.csv'}: {alike!r} and {classes[label_of(alike)]!r} are spellings of one label; make them one")
    recordings = pd.DataFrame({"primary_label": map(label_of, names), "secondary_labels": "[]", "common_name": names,
                               "filename": link_clips(clips, source, out)})
    return DataSet(recordings, folds={"folds.csv": folds}, classes=classes, cache={"window_seconds": 10.0})


def label_of(name: str) -> str:
    """"Donkey/ass braying" -> "donkey_ass_braying": no commas, blanks or slashes."""
    return "_".join(re.findall(r"\w+", name.lower()))
