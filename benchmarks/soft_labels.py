"""What soft labels are worth: students trained on a run's out-of-fold predictions beside the labels, against that run, their teacher.

    python -m benchmarks.soft_labels --run runs/real_birds

Each student has its teacher's settings, folds and seed. Writes soft_labels.md; finished folds are not trained again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.machine import about
from benchmarks.real_birds import call, paired_gain
from src import evaluate, metrics
from src.console import UserError, say, stage
from src.run_config import read_config
from src.settings import parse
from src.storage import write_text


@dataclass(frozen=True)
class SoftLabelSettings:
    run: Path = Path("runs/real_birds")
    """The teacher: a run with all of its folds."""
    soft_weight: float = 0.5
    """Of the prediction in a target, the label having the rest."""
    threads: int = 0
    resamples: int = 1000
    """Of the paired bootstrap over recordings."""
    results: Path = Path("benchmarks/results")


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(SoftLabelSettings, argv, prog="python -m benchmarks.soft_labels", description=__doc__)
    config = settings.run / "fold0" / "config.yaml"
    if not config.exists():
        raise UserError(f"{settings.run} holds no trained fold 0; python -m benchmarks.real_birds trains a run with all folds")
    students = settings.run.with_name(f"{settings.run.name}_soft")
    labels = students / "soft_labels.csv"
    if not labels.exists():
        students.mkdir(parents=True, exist_ok=True)
        call("src.distil", "--run", settings.run, "--out", labels)
    call("src.train", "--config", config, "--run", students, "--fold", "all", "--soft-labels", labels, "--soft-weight", settings.soft_weight,
         "--threads", settings.threads)
    runs = {name: evaluate.out_of_fold(run, (), None) for name, run in (("teacher", settings.run), ("student", students))}
    pooled = {name: pd.concat(folds.values(), ignore_index=True).set_index("filename") for name, (folds, _, _) in runs.items()}
    folds, metadata, given = runs["student"]
    filenames, classes = pooled["student"].index, list(metadata.classes)
    target = evaluate.truth_of(filenames.to_series(), metadata, given)
    student, teacher = (pooled[name].loc[filenames, classes].to_numpy() for name in ("student", "teacher"))
    scores, gain = [metrics.score(target, table) for table in (student, teacher)], paired_gain(target, student, teacher, settings.resamples)
    commits = sorted({read_config(students / f"fold{fold}")["versions"]["commit"] for fold in folds})
    about_student = (f"`{given['settings']['model']}`, {given['settings']['epochs']} epochs, {len(folds)} folds of {len(filenames)} recordings of "
                     f"{len(classes)} classes, out of fold and pooled; students trained at commit {', '.join(commits)}.")
    lines = ["# Soft labels", "", about(f"python -m benchmarks.soft_labels --run {settings.run} --soft-weight {settings.soft_weight:g}"), "",
             f"{about_student} A student's target is {settings.soft_weight:g} of what the teacher says of the recording, out of fold, the rest its label; "
             "all else is as the teacher's. Intervals: 95 % bootstraps over recordings; the gain's is paired. A teacher of another fold was trained on the "
             "labels of the recordings that a student is scored on, so the gain is rather too good.", "",
             "| | student | teacher | gain |", "|---|---|---|---|"]
    lines += [f"| {title} | {scores[0][key]} | {scores[1][key]} | {gain.get(key, '')} |" for key, title in evaluate.NAMES.items()]
    write_text(settings.results / "soft_labels.md", "\n".join([*lines, ""]))
    say("\n" + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
