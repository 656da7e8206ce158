"""Soft labels: a CSV of filename, source and one probability a class, to train on beside the labels; made by src.distil."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from .console import UserError, say
from .metadata import Metadata, read_csv

UNSEEN = "unseen"  # the source of a recording that no teacher was trained on; else the fold in which it was held out


def read_soft_labels(file: Path, metadata: Metadata, folds: dict[str, int]) -> pd.DataFrame:
    """(recordings by filename, classes) float32 probabilities.

    For a recording of the fold table only a prediction made while its own fold was held out is accepted: a teacher that was
    trained on a recording knows its label by heart. Raises UserError for any other, and for values outside [0, 1].
    """
    table, classes = read_csv(file), list(metadata.classes)
    if table.columns.tolist() != ["filename", "source", *classes]:
        raise UserError(f"{file}: the columns must be filename, source and the {len(classes)} classes in their order; make it with python -m src.distil")
    if table.filename.duplicated().any():
        raise UserError(f"{file}: {table.filename[table.filename.duplicated()].iloc[0]} stands there twice; make it again with python -m src.distil")
    main = set(metadata.table.filename[~metadata.table.is_extra])
    allowed = [str(folds.get(name, -1)) if name in main else UNSEEN for name in table.filename]
    wrong = (table.source != allowed) | (table.source == "-1")
    if wrong.any():
        row = table[wrong].iloc[0]
        raise UserError(f"{file}: {row.filename} comes from source {row.source or 'unknown'!r}, not out of fold ({wrong.sum()} such rows): "
                        "for labelled recordings only predictions of a model that held them out may enter; make the file with python -m src.distil")
    try:
        probability = table[classes].astype(np.float32)
    except ValueError as error:
        raise UserError(f"{file}: {error}; make it again with python -m src.distil") from error
    if not ((probability >= 0) & (probability <= 1)).to_numpy().all():
        raise UserError(f"{file}: a value is no probability between 0 and 1; make it again with python -m src.distil")
    probability.index = pd.Index(table.filename)
    absent = (~probability.index.isin(metadata.table.filename)).sum()
    say(f"soft labels for {len(probability) - absent} recordings from {file}" + (f"; {absent} more are in no data folder" if absent else ""))
    return probability


def blend(table: pd.DataFrame, target: np.ndarray, weight: np.ndarray, soft: pd.DataFrame, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The (n, C) targets and weights with soft labels blended in: (1 - share) x label + share x soft label where a recording
    has both, the soft label alone where it is unlabelled. A masked class is no longer masked: the teacher has a say."""
    rows = np.flatnonzero(table.filename.isin(soft.index))
    given = soft.loc[table.filename.iloc[rows]].to_numpy()
    share_of = np.where(table.primary_label.iloc[rows] == "", 1.0, share)[:, None].astype(np.float32)
    target, weight = target.copy(), weight.copy()
    target[rows] = np.where(weight[rows] > 0, (1 - share_of) * target[rows] + share_of * given, given)
    weight[rows] = 1
    return target, weight
