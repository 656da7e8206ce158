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
from src.folds import read_folds
from src.folds_audit import recordist_in_training
from src.run_config import read_config
from src.settings import parse
from src.storage import write_text

FREQUENT = 10  # recordings of one recordist


@dataclass(frozen=True)
class ChainSettings:
    data: Path = Path("input/birds")
    metadata: Path | None = None
    noise: Path | None = None
    soundscapes: tuple[Path, ...] = ()
    recipe: Path = Path("src/recipes/cpu.yaml")
    run: Path = Path("runs/real_birds")
    resamples: int = 1000
    """Of the bootstraps over recordings."""


def call(*words: object) -> None:
    say(f"\n$ python -m {' '.join(map(str, words))}")
    if subprocess.run([sys.executable, "-m", *map(str, words)]).returncode:
        raise UserError(f"{words[0]} failed")


def macro_ap(target: np.ndarray, probability: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) under each column of row weights."""
    return metrics.mean_known(metrics.per_class(target, probability, weights)[0])


def macro_ap_of_folds(target: np.ndarray, probability: np.ndarray, weights: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """(R,) the mean of the folds' own; fold: (n,). Pooled, the models of different folds have to agree on a scale besides."""
    return np.mean([macro_ap(target[fold == k], probability[fold == k], weights[fold == k]) for k in np.unique(fold)], axis=0)


def paired_gain(target: np.ndarray, ours: np.ndarray, theirs: np.ndarray, resamples: int) -> dict[str, metrics.Estimate]:
    """Our top-1 and macro AP less the baseline's, with 95 % intervals over the same resampled recordings."""
    weights = metrics.bootstrap_weights(len(target), resamples)
    gain = {"top1": (metrics.top1(target, ours) - metrics.top1(target, theirs)) @ weights / len(target),
            "macro_ap": macro_ap(target, ours, weights) - macro_ap(target, theirs, weights)}
    return {name: metrics.estimate(v, -1) for name, v in gain.items()}


def by_recordist(table: pd.DataFrame, in_training: np.ndarray, hits: dict[str, np.ndarray], resamples: int) -> list[str]:
    """Top-1 by what training knew of the recordist: `in_training` (n,), `hits` (n,) of each model. A model may know a recordist's microphone and place."""
    author, known = table.author.to_numpy(), (table.author != "").to_numpy()
    frequent = table.author[known].value_counts()
    frequent = frequent[frequent >= FREQUENT]
    groups = {"the recordist is known and also in training": known & in_training,
              "the recordist is known and not in training": known & ~in_training, "the recordist is unknown": ~known}
    groups |= {f"recorded by {name}, {table.primary_label[author == name].nunique()} of the classes": author == name for name in frequent.index}
    groups["none of theirs"] = ~np.isin(author, list(frequent.index))

    def top1(hit: np.ndarray) -> metrics.Estimate:
        return metrics.estimate(hit @ metrics.bootstrap_weights(len(hit), resamples) / len(hit))

    return ["", "By the recordist, and for each with ten recordings or more:", "", f"| top-1 | recordings | {' | '.join(hits)} |", "|---|---|---|---|",
            *(f"| {title} | {rows.sum()} | {' | '.join(str(top1(hit[rows])) for hit in hits.values())} |" for title, rows in groups.items() if rows.any())]


@resumable
def main(argv: list[str] | None = None) -> None:
    settings = parse(ChainSettings, argv, prog="python -m benchmarks.real_birds", description=__doc__)
    name = settings.run.name
    folds, cache = settings.run / "folds.csv", Path("input/cache") / name
    flags = ["--metadata", settings.metadata] if settings.metadata else []
    call("src.folds", "--data", settings.data, *flags, "--out", folds)
    call("src.cache", "--data", settings.data, *flags, "--out", cache)
    call("src.train", "--config", settings.recipe, "--data", settings.data, *flags, "--folds", folds, "--cache", cache, "--run", settings.run,
         "--fold", "all", *(["--noise", settings.noise] if settings.noise else []))
    call("src.evaluate", "--run", settings.run, "--data", settings.data, *flags)
    by_fold, metadata, config = evaluate.out_of_fold(settings.run, (settings.data,), settings.metadata)
    pooled = pd.concat(by_fold.values(), ignore_index=True)
    target = evaluate.truth_of(pooled.filename, metadata, config)
    ours = pooled[list(metadata.classes)].to_numpy()
    theirs = baseline((settings.data,), settings.metadata, folds, cache).loc[pooled.filename, list(metadata.classes)].to_numpy()
    ours_scores, their_scores = (metrics.score(target, p, resamples=settings.resamples) for p in (ours, theirs))
    commits = sorted({read_config(settings.run / f"fold{fold}")["versions"]["commit"] for fold in by_fold})
    gain = paired_gain(target, ours, theirs, settings.resamples)
    lines = ["# The whole chain on real recordings", "", about(f"python -m benchmarks.real_birds --recipe {settings.recipe}"), "",
             f"{len(pooled)} recordings of {len(metadata.classes)} classes, {len(by_fold)} folds, out of fold and pooled; `{config['settings']['model']}`, "
             f"{config['settings']['epochs']} epochs from scratch, trained at commit {', '.join(commits)}. "
             "Logistic regression: mean, standard deviation, 90th percentile and mean step over time of each mel band, of windows normalised as the "
             "network's are, standardised, C = 1, same folds. Intervals: 95 % bootstraps over recordings; the gain's is paired. Pooled, a score also asks "
             "that the folds' models agree on a scale, which the mean of the folds does not.", "",
             f"| | {config['settings']['model']} | logistic regression | gain |", "|---|---|---|---|"]
    lines += [f"| {title} | {ours_scores[key]} | {their_scores[key]} | {gain.get(key, '')} |" for key, title in evaluate.NAMES.items()]
    fold = np.repeat(list(by_fold), [len(of_fold) for of_fold in by_fold.values()])
    weights = metrics.bootstrap_weights(len(target), settings.resamples)
    of_folds = [macro_ap_of_folds(target, probability, weights, fold) for probability in (ours, theirs)]
    lines.append(f"| macro AP, mean of the folds | {metrics.estimate(of_folds[0])} | {metrics.estimate(of_folds[1])} | "
                 f"{metrics.estimate(of_folds[0] - of_folds[1], -1)} |")
    table = metadata.table.set_index("filename")
    in_training = pd.Series(recordist_in_training(table.author, table.index.map(read_folds(folds)).to_numpy()), table.index)
    lines += by_recordist(table.loc[pooled.filename], in_training[pooled.filename].to_numpy(),
                          {config["settings"]["model"]: metrics.top1(target, ours), "logistic regression": metrics.top1(target, theirs)},
                          settings.resamples)
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
