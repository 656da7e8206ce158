"""STAGE 4: out-of-fold predictions -> runs/<run>/report.md and its pictures, metrics.csv, per_class.csv; scores submissions."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import tyro

from . import competitions, metrics
from .cache import Cache
from .config import differences
from .console import UserError, say, stage
from .metadata import Metadata, read_csv, read_metadata, targets
from .metrics import NAMES
from .run_config import comparable, read_config
from .settings import parse
from .storage import fold_folders, owned_file, safe_cell, write_table
from .submission import read_labels, read_rows


@dataclass(frozen=True)
class EvaluateSettings:
    run: Path = Path("runs/asca")
    data: Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="(default: the run's)")] = ()
    """Where the metadata lie, if no longer where they lay when the run was trained."""
    metadata: Path | None = None
    """Another table in train_metadata.csv's columns, if not the run's."""
    cache: Path | None = None
    """Where the report's spectrograms come from; by default where it lay when the run was trained."""
    resamples: int = 1000
    """Of the bootstrap."""
    submission: Path | None = None
    """Score this submission instead of a run ..."""
    labels: Path | None = None
    """... against this CSV of row_id and labels (separated by blanks or semicolons)."""
    competition: str = competitions.DEFAULT
    """Whose metric comes first among a submission's scores."""


def read_oof(folder: Path, classes: list[str]) -> pd.DataFrame:
    """A fold's out-of-fold table: filename and one probability a class. Raises UserError where it is not whole."""
    table = read_csv(folder / "oof.csv")
    if table.columns.tolist() != ["filename", *classes]:
        raise UserError(f"{folder / 'oof.csv'} has other columns than the run's classes; train the fold again with --restart")
    try:
        table[classes] = table[classes].astype(float)
    except ValueError as error:
        raise UserError(f"{folder / 'oof.csv'}: {error}; train the fold again with --restart") from error
    if not np.isfinite(table[classes].to_numpy()).all():
        raise UserError(f"{folder / 'oof.csv'} holds a probability that is not finite; train the fold again with --restart")
    if table.empty:
        raise UserError(f"{folder / 'oof.csv'} holds no recording; train the fold again with --restart")
    return table


def out_of_fold(run: Path, data: tuple[Path, ...], metadata: Path | None) -> tuple[dict[int, pd.DataFrame], Metadata, dict]:
    """Each finished fold's predictions, the metadata, and the settings that the folds share.

    Raises UserError where no fold is finished, their settings differ, or a recording is held out twice.
    """
    folders = fold_folders(run, "weights.safetensors")
    if not folders:
        raise UserError(f"{run} holds no finished fold; train one with python -m src.train --run {run}")
    configs = [read_config(folder) for folder in folders]
    for folder, config in zip(folders[1:], configs[1:]):
        changed = differences(comparable(configs[0], between_folds=True), comparable(config, between_folds=True))
        if changed:
            raise UserError(f"{folders[0]} and {folder} were trained with different settings: {'; '.join(changed)}")
    config = configs[0]
    folds = {int(folder.name[4:]): read_oof(folder, config["classes"]) for folder in folders}
    names = pd.concat([table.filename for table in folds.values()])
    if names.duplicated().any():
        raise UserError(f"{run}: {names[names.duplicated()].iloc[0]} is held out by two folds; they come from different fold tables")
    settings = config["settings"]
    read = read_metadata(data or tuple(map(Path, settings["data"])), metadata or settings["metadata"])
    absent = names[~names.isin(read.table.filename)]
    if len(absent) or list(read.classes) != config["classes"]:
        raise UserError(f"{run} was trained on other metadata than {data or settings['data']}; name the right --data and --metadata")
    return folds, read, config


def truth_of(names: pd.Series, metadata: Metadata, config: dict) -> np.ndarray:
    """(n, C) 0/1: the primary label, and secondary ones where the run was trained to find them (soft or hard)."""
    secondary = config["settings"]["secondary_labels"]
    rows = metadata.table.set_index("filename").loc[names].reset_index()
    return targets(rows, metadata.classes, "hard" if secondary in ("soft", "hard") else "ignore")[0]


def open_cache(named: Path | None, config: dict) -> tuple[Cache | None, str]:
    """The cache to draw from, or None and why there is none. Raises UserError where --cache (`named`) does not fit."""
    folder = named or Path(config["settings"]["cache"])
    try:
        cache = Cache(folder)
        if changed := differences(config["audio"], cache.config.to_dict()):
            raise UserError(f"{folder} holds another recipe than the run was trained on ({'; '.join(changed)})")
        return cache, ""
    except UserError as error:
        if named:
            raise
        return None, f"{error}; --cache names another place"


def evaluate_run(settings: EvaluateSettings, folds: dict[int, pd.DataFrame], metadata: Metadata, config: dict) -> None:
    from .report import OutOfFold, write_report  # here, since it imports torch

    cache, why_no_cache = open_cache(settings.cache, config)
    classes, by_fold = list(metadata.classes), {}
    for fold, table in folds.items():
        by_fold[fold] = metrics.score(truth_of(table.filename, metadata, config), table[classes].to_numpy(), resamples=settings.resamples)
    pooled = pd.concat(folds.values(), ignore_index=True)
    truth, probability = truth_of(pooled.filename, metadata, config), pooled[classes].to_numpy()
    pooled_scores = metrics.score(truth, probability, resamples=settings.resamples)
    over_folds = metrics.mean_over(list(by_fold.values()))
    means = {name: str(mean) if np.isnan(mean.value) else f"{mean} +- {deviation:.3f}" for name, (mean, deviation) in over_folds.items()}
    sizes = {fold: len(table) for fold, table in folds.items()} | {"pooled": len(pooled)}
    rows = [{"fold": fold, "recordings": sizes[fold], "metric": name, "value": e.value, "low": e.low, "high": e.high}
            for fold, scores in {**by_fold, "pooled": pooled_scores}.items() for name, e in scores.items()]
    write_table(settings.run / "metrics.csv", pd.DataFrame(rows), float_format="%.6f")
    per_class = per_class_table(classes, metadata, truth, probability)
    write_table(settings.run / "per_class.csv", per_class.assign(primary_label=per_class.primary_label.map(safe_cell)), float_format="%.4f")
    columns = {f"fold {fold}": scores for fold, scores in by_fold.items()}
    if len(folds) > 1:
        columns |= {"mean over folds": means, "pooled": pooled_scores}
    pictures = write_report(OutOfFold(
        run=settings.run, configs={fold: read_config(settings.run / f"fold{fold}") for fold in folds}, metadata=metadata, names=pooled.filename,
        fold=np.repeat(list(folds), [len(table) for table in folds.values()]), truth=truth, probability=probability,
        cache=cache, why_no_cache=why_no_cache), columns, per_class)
    say(f"{len(folds)} fold(s), {len(pooled)} held-out recordings; pooled, with 95 % intervals over recordings:")
    for name, estimate in pooled_scores.items():
        say(f"  {NAMES[name]:14s} {estimate}" + (f"   mean over folds {means[name]}" if len(folds) > 1 else ""))
    if cache is None:
        say(f"the report has no spectrograms: {why_no_cache}")
    say(f"wrote {settings.run}/report.md with {', '.join(pictures)}; metrics.csv, per_class.csv")


def per_class_table(classes: list[str], metadata: Metadata, truth: np.ndarray, probability: np.ndarray) -> pd.DataFrame:
    """One row a class: its recordings (all, held out), AP and ROC-AUC (NaN without a held-out positive)."""
    precision, auc = metrics.per_class(truth, probability)
    counts = metadata.table.primary_label.value_counts().reindex(classes, fill_value=0)
    return pd.DataFrame({"primary_label": classes, "recordings": counts.to_numpy(), "held_out": truth.sum(axis=0).astype(int),
                         "ap": precision[:, 0], "roc_auc": auc[:, 0]})


def score_submission(submission: Path, labels: Path, resamples: int = 1000) -> dict[str, metrics.Estimate]:
    """A submission's scores against a CSV of row_id and labels. Raises UserError where rows or species do not fit."""
    predicted, present = read_rows(submission), read_labels(labels)
    if not present:
        raise UserError(f"{labels} holds no labelled row")
    absent = [row for row in present if row not in predicted.index]
    if absent:
        raise UserError(f"{submission} lacks {len(absent)} of the labelled rows, {absent[0]} for one")
    unknown = sorted({label for row in present.values() for label in row} - set(predicted.columns))
    if unknown:
        say(f"labels of no species of the submission are passed over: {', '.join(unknown[:10])}")
    target = np.array([[label in row for label in predicted.columns] for row in present.values()], float)
    return metrics.score(target, predicted.loc[list(present)].to_numpy(), resamples=resamples)


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(EvaluateSettings, argv, prog="python -m src.evaluate", description=__doc__)
    if (settings.submission is None) != (settings.labels is None):
        raise UserError("--submission and --labels go together")
    if settings.resamples < 1:
        raise UserError("--resamples must be 1 or more")
    if settings.submission is None:
        found = out_of_fold(settings.run, settings.data, settings.metadata)
        with owned_file(settings.run / "report.md"):
            evaluate_run(settings, *found)
        return
    first = competitions.competition(settings.competition).metric
    scores = score_submission(settings.submission, settings.labels, settings.resamples)
    say(f"{settings.submission} against {settings.labels}, with 95 % intervals over rows; {settings.competition}'s metric is {NAMES[first]}:")
    for name in sorted(scores, key=lambda name: name != first):
        say(f"  {NAMES[name]:14s} {scores[name]}")


if __name__ == "__main__":
    sys.exit(main())
