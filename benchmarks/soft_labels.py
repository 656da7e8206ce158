"""What soft labels are worth: students trained on out-of-fold predictions beside the labels, against a run, their teacher.

    python -m benchmarks.soft_labels --run runs/real_birds [--nested --fold 0 1]

Each student has its teacher's settings, folds and seed. The teachers of a fold's student were trained on the labels that it is scored on,
unless --nested: then teachers are trained anew for each fold without its recordings, as many as there are other folds.
Writes soft_labels.md or soft_labels_nested.md; finished folds are not trained again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from benchmarks.machine import about
from benchmarks.real_birds import call, paired_gain
from src import evaluate, metrics
from src.console import UserError, resumable, say
from src.folds import read_folds
from src.run_config import read_config
from src.settings import parse
from src.storage import write_table, write_text

SECOND_HAND = ("A teacher of another fold was trained on the labels of the recordings that a student is scored on, so the gain is rather too good: "
               "`--nested` measures it without that.")
NESTED = ("No teacher of a fold's student saw that fold's recordings: the teachers were trained anew on the other folds, one held out at a time, so on "
          "fewer recordings than other teachers, and the gain is rather too small. `labels alone` is the run itself.")


@dataclass(frozen=True)
class SoftLabelSettings:
    run: Path = Path("runs/real_birds")
    """The teacher: a run with all of its folds."""
    fold: tuple[int, ...] = ()
    """The students' folds; by default all."""
    nested: bool = False
    """Teachers that never saw the recordings a student is scored on."""
    soft_weight: float = 0.5
    """Of the prediction in a target, the label having the rest."""
    threads: int = 0
    resamples: int = 1000
    """Of the bootstraps over recordings."""
    results: Path = Path("benchmarks/results")


def train_student(folds: list[int], teachers: Path, students: Path, settings: SoftLabelSettings) -> dict[int, Path]:
    """Each fold's folder."""
    labels = students / "soft_labels.csv"
    students.mkdir(parents=True, exist_ok=True)
    call("src.distil", "--run", teachers, "--out", labels)  # the same file, unless a teacher was trained anew: then the students are refused
    call("src.train", "--config", settings.run / f"fold{folds[0]}/config.yaml", "--run", students, "--fold", *folds, "--soft-labels", labels,
         "--soft-weight", settings.soft_weight, "--threads", settings.threads)
    return {fold: students / f"fold{fold}" for fold in folds}


def train_teachers(fold: int, teachers: Path, settings: SoftLabelSettings) -> None:
    """On all folds but one, whose recordings are left out of the table (-2): one training for each that remains."""
    config, table = settings.run / f"fold{fold}/config.yaml", teachers / "folds.csv"
    given = read_config(config.parent)["settings"]
    if not table.exists():
        teachers.mkdir(parents=True, exist_ok=True)
        others = pd.Series(read_folds(Path(given["folds"])), name="fold").rename_axis("filename").reset_index()
        write_table(table, others.assign(fold=others.fold.where(others.fold != fold, -2)))
    call("src.train", "--config", config, "--run", teachers, "--folds", table, "--fold", "all", "--threads", settings.threads)


@resumable
def main(argv: list[str] | None = None) -> None:
    settings = parse(SoftLabelSettings, argv, prog="python -m benchmarks.soft_labels", description=__doc__)
    by_fold, metadata, given = evaluate.out_of_fold(settings.run, (), None)
    every = sorted(set(read_folds(Path(given["settings"]["folds"])).values()) - {-1, -2})
    folds = list(dict.fromkeys(settings.fold or every))
    if missing := ({*every, *folds} - set(by_fold)):
        raise UserError(f"{settings.run} holds no trained fold {', '.join(map(str, sorted(missing)))}; python -m benchmarks.real_birds trains all folds")
    if settings.nested and given["settings"]["init"]:
        raise UserError(f"{settings.run} began from other weights, which may know the scored recordings: --nested needs a run from scratch")
    name = f"{settings.run.name}_soft"
    if settings.nested:
        students = {}
        for fold in folds:
            root = settings.run.with_name(f"{name}_nested") / f"without{fold}"
            train_teachers(fold, root / "teachers", settings)
            students |= train_student([fold], root / "teachers", root / "student", settings)
    else:
        students = train_student(folds, settings.run, settings.run.with_name(name), settings)
    classes = list(metadata.classes)
    teacher = pd.concat([by_fold[fold] for fold in folds], ignore_index=True)
    student = pd.concat([evaluate.read_oof(folder, classes) for folder in students.values()]).set_index("filename").loc[teacher.filename, classes].to_numpy()
    target, teacher = evaluate.truth_of(teacher.filename, metadata, given), teacher[classes].to_numpy()
    scores = [metrics.score(target, table, resamples=settings.resamples) for table in (student, teacher)]
    gain = paired_gain(target, student, teacher, settings.resamples)
    commits = sorted({read_config(folder)["versions"]["commit"] for folder in students.values()})
    command = (f"python -m benchmarks.soft_labels --run {settings.run} --fold {' '.join(map(str, folds))}{' --nested' if settings.nested else ''} "
               f"--soft-weight {settings.soft_weight:g}")
    lines = ["# Soft labels" + (", teachers without the scored fold" if settings.nested else ""), "", about(command), "",
             f"`{given['settings']['model']}`, {given['settings']['epochs']} epochs, folds {', '.join(map(str, folds))}: {len(target)} recordings of "
             f"{len(classes)} classes, out of fold and pooled; students trained at commit {', '.join(commits)}. A student's target is "
             f"{settings.soft_weight:g} of what the teacher says of the recording, out of fold, the rest its label; all else is as the teacher's. "
             f"Intervals: 95 % bootstraps over recordings; the gain's is paired. {NESTED if settings.nested else SECOND_HAND}", "",
             "| | student | labels alone | gain |", "|---|---|---|---|"]
    lines += [f"| {title} | {scores[0][key]} | {scores[1][key]} | {gain.get(key, '')} |" for key, title in evaluate.NAMES.items()]
    write_text(settings.results / f"soft_labels{'_nested' if settings.nested else ''}.md", "\n".join([*lines, ""]))
    say("\n" + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
