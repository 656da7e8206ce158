"""What each step of the recipe is worth: paired gains over one base recipe, on ESC-10 and on bird families.

    python -m benchmarks.ablation --esc10 DIR --birds DIR --birds-metadata FILE --noise DIR [--steps ema roll ...]

Trains asca_test at 128 x 128 from scratch, every fold, once for each step and seed (finished runs are read, not run
again), and keeps each held-out recording's rank of the true class in benchmarks/results/ablation_ranks.csv, so that gains and
intervals can be made again without training. Writes benchmarks/results/ablation.md.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.machine import about
from src import evaluate, metrics
from src.console import UserError, say, stage
from src.demo_data import RATE, noise, write_audio
from src.metadata import read_csv
from src.run_config import read_config
from src.settings import parse
from src.storage import atomic, write_text

RESULTS = Path("benchmarks/results")
SIZE = ("--model", "asca_test", "--input-side", "128")
BASE = (*SIZE, "--batch-size", "16", "--epochs", "30", "--learning-rate", "1e-3", "--warmup-epochs", "2")
STEPS: dict[str, tuple[str, ...]] = {  # name -> flags of src.train; each is BASE but for what it names
    "base": BASE,
    "paper": ("--config", "src/recipes/paper.yaml", *SIZE),
    "lr": (*BASE, "--learning-rate", "3e-3"),
    "ema": (*BASE, "--ema-decay", "0.99"),
    "roll": (*BASE, "--roll-probability", "0.5"),
    "filter": (*BASE, "--filter-db", "6"),
    "drop_path": (*BASE, "--drop-path", "0"),
    "mixup_linear": (*BASE, "--mixup-target", "linear"),
    "batch": (*BASE, "--batch-size", "8"),
    "gem": (*BASE, "--head", "gem"),
    "focal": (*BASE, "--loss", "focal"),
    "spec_augment": (*BASE, "--spec-augment-probability", "1", "--frequency-mask-bins", "24", "--time-mask-frames", "100"),
    "mixup": (*BASE, "--mixup-probability", "1", "--mixup-alpha", "1"),
}


@dataclass(frozen=True)
class AblationSettings:
    esc10: Path | None = None
    """A copy of ESC-50, or ESC-10: a folder with meta.csv and audio/."""
    birds: Path | None = None
    """A folder in BirdCLEF's layout ..."""
    birds_metadata: Path | None = None
    noise: Path | None = None
    """... and its background noise. ESC-10 gets made noise, since public noise is often cut from it."""
    steps: tuple[str, ...] = tuple(STEPS)
    seeds: tuple[int, ...] = (0, 1)
    runs: Path = Path("runs/ablation")
    jobs: int = 1
    """Trainings side by side, of one thread each."""
    resamples: int = 2000


def call(*words: object) -> None:
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"python -m {' '.join(map(str, words))} failed:\n{done.stderr[-2000:]}")


def prepare(settings: AblationSettings) -> dict[str, list[object]]:
    """Makes folds, caches and noise, and returns each data set's flags for src.train."""
    flags: dict[str, list[object]] = {}
    if settings.esc10:
        data, made = settings.runs / "esc10", settings.runs / "made_noise"
        if not (data / "folds.csv").exists():
            call("src.prepare", "esc10", settings.esc10, "--out", data)
            rng = np.random.default_rng(0)
            for number in range(12):
                write_audio(made / f"{number}.ogg", (0.05 * noise(10, ("wind", "rain", "insects")[number % 3], rng)).astype(np.float32)[: 10 * RATE])
        flags["esc10"] = ["--data", data, "--folds", data / "folds.csv", "--cache", settings.runs / "esc10_cache", "--noise", made]
        call("src.cache", "--data", data, "--out", settings.runs / "esc10_cache")
    if settings.birds:
        table = ["--metadata", settings.birds_metadata] if settings.birds_metadata else []
        data = ["--data", settings.birds, *table]
        call("src.folds", *data, "--out", settings.runs / "birds_folds.csv")
        call("src.cache", *data, "--out", settings.runs / "birds_cache")
        flags["birds"] = [*data, "--folds", settings.runs / "birds_folds.csv", "--cache", settings.runs / "birds_cache",
                          *(["--noise", settings.noise] if settings.noise else [])]
    return flags


def train(settings: AblationSettings, data: str, step: str, seed: int, flags: list[object]) -> None:
    run = settings.runs / data / f"{step}_{seed}"
    call("src.train", *STEPS[step], *flags, "--run", run, "--fold", "all", "--seed", seed, "--threads", "1", "--workers", "0")
    say(f"trained {run}: top-1 {(score(run)['rank'] == 0).mean():.3f}")


def score(run: Path) -> pd.DataFrame:
    """One row a held-out recording: filename, rank of its class (0: first; ties count against it)."""
    by_fold, metadata, config = evaluate.out_of_fold(run, (), None)
    pooled = pd.concat(by_fold.values(), ignore_index=True)
    truth, probability = evaluate.truth_of(pooled.filename, metadata, config), pooled[list(metadata.classes)].to_numpy()
    own = (probability * truth).sum(axis=1, keepdims=True)
    return pd.DataFrame({"filename": pooled.filename, "rank": (probability >= own).sum(axis=1) - 1,
                         "macro_ap": np.nanmean(metrics.per_class(truth, probability)[0])}).sort_values("filename", ignore_index=True)


def collect(settings: AblationSettings) -> None:
    """Adds the finished runs to the two result tables."""
    ranks = {name: read_csv(file) for name in ("esc10", "birds") if (file := RESULTS / f"ablation_ranks_{name}.csv").exists()}
    runs = read_csv(RESULTS / "ablation_runs.csv") if (RESULTS / "ablation_runs.csv").exists() else pd.DataFrame()
    for data in ("esc10", "birds"):
        for folder in sorted((settings.runs / data).glob("*_*")):
            if not (folder.is_dir() and len(list(folder.glob("fold*/weights.safetensors"))) == (4 if data == "esc10" else 5)):
                continue
            scored = score(folder)
            table = ranks.setdefault(data, scored[["filename"]].copy())
            table[folder.name] = table.filename.map(scored.set_index("filename")["rank"]).astype(str)
            facts = read_config(folder / "fold0")
            row = {"data": data, "run": folder.name, "top1": f"{(scored['rank'] == 0).mean():.4f}", "macro_ap": f"{scored.macro_ap[0]:.4f}",
                   "epochs": str(facts["settings"]["epochs"]), "commit": facts["versions"]["commit"]}
            if len(runs):
                runs = runs[(runs.data != data) | (runs.run != folder.name)]
            runs = pd.concat([runs, pd.DataFrame([row])], ignore_index=True)
    for name, table in [*((f"ranks_{data}", table) for data, table in ranks.items()), ("runs", runs.sort_values(["data", "run"]))]:
        with atomic(RESULTS / f"ablation_{name}.csv") as partial:
            table.to_csv(partial, index=False, lineterminator="\n")


def mean_over_seeds(ranks: pd.DataFrame, step: str) -> tuple[np.ndarray, int] | None:
    """((recordings, 2) top-1 and reciprocal rank, mean over the seeds that were run; their number)."""
    columns = [column for column in ranks if column.rsplit("_", 1)[0] == step]
    if not columns:
        return None
    rank = ranks[columns].astype(int).to_numpy()
    return np.stack([(rank == 0).mean(axis=1), (1 / (1 + rank)).mean(axis=1)], axis=1), len(columns)


def interval(values: np.ndarray, resamples: int) -> str:
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(resamples, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def report(settings: AblationSettings) -> str:
    runs = read_csv(RESULTS / "ablation_runs.csv")
    lines = ["# What each step of the recipe is worth", "", about("python -m benchmarks.ablation"), "",
             f"Base: `{' '.join(BASE)}`. Each line changes one thing; gains over the base are paired by recording, means over the seeds, with 95 % "
             "bootstraps over recordings. Out of fold, from scratch. MRR: mean reciprocal rank of the true class."]
    for data, title in (("esc10", "ESC-10, folds 1 to 4 (320 clips)"), ("birds", "12 families of birds (163 recordings), 5 folds")):
        file = RESULTS / f"ablation_ranks_{data}.csv"
        if not file.exists():
            continue
        ranks = read_csv(file)
        base = mean_over_seeds(ranks, "base")
        lines += ["", f"## {title}", "", "| step | changed | seeds | top-1 | macro AP | gain in top-1 | gain in MRR |", "|---|---|---|---|---|---|---|"]
        for step, flags in STEPS.items():
            found = mean_over_seeds(ranks, step)
            if found is None or base is None:
                continue
            values, seeds = found
            changed = " ".join(flags[len(BASE):]) if flags[: len(BASE)] == BASE else " ".join(flags)
            mine = runs[(runs.data == data) & (runs.run.str.rsplit("_", n=1).str[0] == step)]
            gains = ["", ""] if step == "base" else [interval(values[:, k] - base[0][:, k], settings.resamples) for k in (0, 1)]
            lines.append(f"| {step} | {'' if step == 'base' else f'`{changed}`'} | {seeds} | {values[:, 0].mean():.3f} | "
                         f"{mine.macro_ap.astype(float).mean():.3f} | {gains[0]} | {gains[1]} |")
    lines += ["", f"Trained at commit {', '.join(sorted(set(runs.commit)))}.", ""]
    return "\n".join(lines)


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(AblationSettings, argv, prog="python -m benchmarks.ablation", description=__doc__)
    unknown = set(settings.steps) - set(STEPS)
    if unknown:
        raise UserError(f"--steps: unknown {', '.join(sorted(unknown))}; known are {', '.join(STEPS)}")
    flags = prepare(settings)
    jobs = [(data, step, seed) for seed in settings.seeds for step in settings.steps for data in flags]
    with ThreadPoolExecutor(settings.jobs) as pool:
        for _ in pool.map(lambda job: train(settings, *job, flags[job[0]]), jobs):
            pass
    collect(settings)
    text = report(settings)
    write_text(RESULTS / "ablation.md", text)
    say(text)


if __name__ == "__main__":
    sys.exit(main())
