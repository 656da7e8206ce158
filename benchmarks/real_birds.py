"""The whole chain on real recordings, and logistic regression on the same folds.

    python -m benchmarks.real_birds --data DATA --metadata FILE --noise DIR --soundscapes DIR ... [--labels FILE]

Runs the six stages (finished folds are not trained again), scores the run and the baseline out of fold, and turns each folder of
soundscapes into a validated submission and pictures. Writes benchmarks/results/real_birds.md.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.logistic_baseline import out_of_fold as baseline
from benchmarks.machine import about
from src import evaluate, metrics
from src.console import UserError, resumable, say
from src.run_config import read_config
from src.settings import parse
from src.storage import write_text


@dataclass(frozen=True)
class ChainSettings:
    data: Path = Path("input/birds")
    metadata: Path | None = None
    noise: Path | None = None
    soundscapes: tuple[Path, ...] = ()
    recipe: Path = Path("src/recipes/cpu.yaml")
    run: Path = Path("runs/real_birds")
    resamples: int = 1000
    """Of the paired bootstrap over recordings."""


def call(*words: object) -> None:
    say(f"\n$ python -m {' '.join(map(str, words))}")
    if subprocess.run([sys.executable, "-m", *map(str, words)]).returncode:
        raise UserError(f"{words[0]} failed")


def paired_gain(target: np.ndarray, ours: np.ndarray, theirs: np.ndarray, resamples: int) -> dict[str, metrics.Estimate]:
    """Our top-1 and macro AP less the baseline's, with 95 % intervals over the same resampled recordings."""
    weights = metrics.bootstrap_weights(len(target), resamples)
    gain = {"top1": (metrics.top1(target, ours) - metrics.top1(target, theirs)) @ weights / len(target),
            "macro_ap": metrics.mean_known(metrics.per_class(target, ours, weights)[0]) - metrics.mean_known(metrics.per_class(target, theirs, weights)[0])}
    return {name: metrics.estimate(v, -1) for name, v in gain.items()}


@resumable
def main(argv: list[str] | None = None) -> None:
    settings = parse(ChainSettings, argv, prog="python -m benchmarks.real_birds", description=__doc__)
    name = settings.run.name
    folds, cache = settings.run / "folds.csv", Path("input/cache") / name
    table = ["--metadata", settings.metadata] if settings.metadata else []
    call("src.folds", "--data", settings.data, *table, "--out", folds)
    call("src.cache", "--data", settings.data, *table, "--out", cache)
    call("src.train", "--config", settings.recipe, "--data", settings.data, *table, "--folds", folds, "--cache", cache, "--run", settings.run,
         "--fold", "all", *(["--noise", settings.noise] if settings.noise else []))
    call("src.evaluate", "--run", settings.run, "--data", settings.data, *table)
    by_fold, metadata, config = evaluate.out_of_fold(settings.run, (settings.data,), settings.metadata)
    pooled = pd.concat(by_fold.values(), ignore_index=True)
    target = evaluate.truth_of(pooled.filename, metadata, config)
    ours = pooled[list(metadata.classes)].to_numpy()
    theirs = baseline((settings.data,), settings.metadata, folds, cache).loc[pooled.filename, list(metadata.classes)].to_numpy()
    ours_scores, their_scores = metrics.score(target, ours), metrics.score(target, theirs)
    commits = sorted({read_config(settings.run / f"fold{fold}")["versions"]["commit"] for fold in by_fold})
    gain = paired_gain(target, ours, theirs, settings.resamples)
    lines = ["# The whole chain on real recordings", "", about(f"python -m benchmarks.real_birds --recipe {settings.recipe}"), "",
             f"{len(pooled)} recordings of {len(metadata.classes)} classes, {len(by_fold)} folds, out of fold and pooled; `{config['settings']['model']}`, "
             f"{config['settings']['epochs']} epochs from scratch, trained at commit {', '.join(commits)}. "
             "Logistic regression: mean and standard deviation over time of each mel band, standardised, "
             "C = 1, same folds. Intervals: 95 % bootstraps over recordings; the gain's is paired.", "",
             f"| | {config['settings']['model']} | logistic regression | gain |", "|---|---|---|---|"]
    lines += [f"| {title} | {ours_scores[key]} | {their_scores[key]} | {gain.get(key, '')} |" for key, title in evaluate.NAMES.items()]
    call("src.export", "--run", settings.run)
    lines += ["", "| soundscapes | rows | submission |", "|---|---|---|"]
    for folder in settings.soundscapes:
        out = Path("submissions") / f"{name}_{folder.name}.csv"
        call("src.infer", "--run", settings.run, "--soundscapes", folder, "--out", out)  # fails where it is not valid
        call("src.timeline", "--submission", out, "--soundscapes", folder, "--out", settings.run / "timelines" / folder.name)
        lines.append(f"| {folder.name} | {len(pd.read_csv(out, usecols=['row_id']))} | valid |")
    write_text(Path("benchmarks/results/real_birds.md"), "\n".join([*lines, ""]))
    say("\n" + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
