"""Two processes against one: do they score the same recordings, and as well?

    python -m benchmarks.two_processes --run runs/real_birds [--fold 0 1]

Trains folds of a run again under its own settings: with two processes on the CPU, and alone under the next seed, which shows what chance
does. Writes two_processes.md; finished folds are not trained again.
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
from src.run_config import read_config
from src.settings import parse
from src.storage import write_text

LAUNCH = ("torch.distributed.run", "--standalone", "--nproc_per_node", 2, "-m")  # torchrun


@dataclass(frozen=True)
class TwoProcessesSettings:
    run: Path = Path("runs/real_birds")
    """Trained by one process."""
    fold: tuple[int, ...] = (0, 1)
    resamples: int = 1000
    """Of the paired bootstrap over recordings."""
    results: Path = Path("benchmarks/results")


@resumable
def main(argv: list[str] | None = None) -> None:
    settings = parse(TwoProcessesSettings, argv, prog="python -m benchmarks.two_processes", description=__doc__)
    folds = list(dict.fromkeys(settings.fold))
    if missing := set(folds) - set(evaluate.out_of_fold(settings.run, (), None)[0]):
        raise UserError(f"{settings.run} holds no trained fold {', '.join(map(str, sorted(missing)))}; python -m benchmarks.real_birds trains all folds")
    two, again = (settings.run.with_name(f"{settings.run.name}_{name}") for name in ("two_processes", "next_seed"))
    for fold in folds:
        config = settings.run / f"fold{fold}" / "config.yaml"
        flags = ("--config", config, "--fold", fold, "--device", "cpu", "--threads", 1)
        call(*LAUNCH, "src.train", "--", *flags, "--run", two)
        call("src.train", *flags, "--run", again, "--seed", read_config(config.parent)["settings"]["seed"] + 1)
    tables = {}
    for run in (settings.run, two, again):
        by_fold, metadata, given = evaluate.out_of_fold(run, (), None)
        tables[run] = pd.concat([by_fold[fold] for fold in folds], ignore_index=True)
        if tables[run].filename.tolist() != tables[settings.run].filename.tolist():
            raise UserError(f"{run} scored other recordings than {settings.run}")
    target = evaluate.truth_of(tables[settings.run].filename, metadata, given)
    probability = [table[list(metadata.classes)].to_numpy() for table in tables.values()]
    scores = [metrics.score(target, p, resamples=settings.resamples) for p in probability]
    gains = [paired_gain(target, p, probability[0], settings.resamples) for p in probability[1:]]
    commits = ["/".join(sorted({read_config(run / f"fold{fold}")["versions"]["commit"] for fold in folds})) for run in tables]
    lines = ["# Two processes against one", "", about(f"python -m benchmarks.two_processes --run {settings.run} --fold {' '.join(map(str, folds))}"), "",
             f"The same {len(target)} out-of-fold recordings of {len(metadata.classes)} classes, in the same order; folds {', '.join(map(str, folds))}, "
             f"`{given['settings']['model']}`, {given['settings']['epochs']} epochs in batches of {given['settings']['batch_size']} over all processes. "
             f"One other seed shows what chance can do. Trained at commits {', '.join(commits)}. Intervals: 95 % bootstraps over recordings; the "
             "differences' are paired.", "",
             "| | one | two | one, next seed | two less one | next seed less one |", "|---|---|---|---|---|---|"]
    for key, title in evaluate.NAMES.items():
        lines.append(f"| {title} | {' | '.join([*(str(score[key]) for score in scores), *(str(gain.get(key, '')) for gain in gains)])} |")
    write_text(settings.results / "two_processes.md", "\n".join([*lines, ""]))
    say("\n" + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
