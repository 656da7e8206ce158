"""Trains every model of the paper's tables and figures on the same folds -> benchmarks/results/: the tables, their pictures, experiments.csv."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from . import cache as cache_stage
from . import folds as fold_stage
from .cache import Cache
from .config import AudioConfig
from .console import UserError, progress, resumable, say, usable_cores
from .devices import device_name
from .experiment_report import stem_of, write_report
from .experiment_results import FLOATS, SPEED, Cell, Results, read_table
from .experiment_training import Job, Workers
from .fold_training import digest_of
from .folds import read_folds
from .metadata import read_metadata
from .models import create_model
from .network_cost import cpu_windows_per_second
from .paper_tables import BUDGETS, PAPER, Budget, Row, Table
from .recipe_table import recipe_table, sizes_table
from .settings import parse
from .storage import owned, write_table

TABLES = {**PAPER, "recipe": recipe_table, "sizes": sizes_table}
KEPT = "kept"  # in a fold's folder: its weights stay, whatever later commands say
N_CLASSES = 264  # of the networks whose speed is measured: BirdCLEF 2023's


@dataclass(frozen=True)
class ExperimentSettings:
    tables: tyro.conf.Positional[tuple[Literal["table1", "table2", "figure2", "figure3", "section42", "recipe", "sizes", "all"], ...]] = ()
    """Which of the paper's tables and figures; all: all of these.
    recipe: what each step of the default recipe is worth; sizes: that recipe by the size of ASCA (with --epochs 120)."""
    data: tuple[Path, ...] = ()
    """Data sets in BirdCLEF's layout. Their folds are <data>/folds.csv, else made once by src.folds; so are their caches by src.cache."""
    noise: tuple[str, ...] = ()
    """NAME=DIR: background noise for the data set of that name. Mind that public noise is often cut from ESC-50."""
    budget: Literal["full", "small"] = "full"
    """full: the published sizes at 224 x 224, all folds, three seeds.
    small: each one's smallest variant at 128 x 128, 15 epochs in batches of 8, two folds, one seed."""
    seeds: tuple[int, ...] = ()
    """By default the budget's; so are the next four."""
    epochs: int = 0
    input_side: int = 0
    n_folds: int = 0
    """The first so many of each data set."""
    asca: str = ""
    """The variant that is ASCA: asca_nano (full) or asca_test (small)."""
    rows: tuple[str, ...] = ()
    """Train only these rows of the tables, by their names, and those that they are compared with."""
    jobs: int = 0
    """Trainings side by side, at most 8 by default: one a core on a CPU, one for two cores beside a GPU."""
    device: str = "auto"
    keep_weights: bool = False
    """Keep every fold's weights once it is scored; later commands leave them alone."""
    runs: Path = Path("runs/experiments")
    cache: Path = Path("input/cache")
    results: Path = Path("benchmarks/results")
    """Where experiments.csv and the tables go. What is finished there is not trained again, also on another machine."""
    speed: bool = False
    """Also measure what is missing of each model's windows a second on this machine's CPU (nothing else should run beside it)."""
    only_report: bool = False
    """Only draw the tables from experiments.csv again; without --data (whose names alone count then) and --noise, of all that is there."""


@dataclass(frozen=True)
class DataSet:
    name: str
    folder: Path
    folds: Path
    cache: Path
    noise: Path | None
    numbers: tuple[int, ...]  # of the folds
    split: str  # digest of what its scores belong to


def budget_of(settings: ExperimentSettings) -> Budget:
    usual = BUDGETS[settings.budget]
    return replace(usual, seeds=settings.seeds or usual.seeds, epochs=settings.epochs or usual.epochs, side=settings.input_side or usual.side,
                   n_folds=settings.n_folds or usual.n_folds, models=(*usual.models[:-1], settings.asca or usual.models[-1]))


def noise_of(settings: ExperimentSettings, names: list[str]) -> dict[str, Path]:
    pairs = dict(text.partition("=")[::2] for text in settings.noise)
    unknown = [name for name, folder in pairs.items() if name not in names or not folder]
    if unknown:
        raise UserError(f"--noise {unknown[0]}: write NAME=DIR, where NAME is one of the data sets ({', '.join(names)})")
    return {name: Path(folder) for name, folder in pairs.items()}


def open_data(settings: ExperimentSettings, folder: Path, noise: Path | None, n_folds: int) -> DataSet:
    """Makes what a data set lacks: its folds, its cache."""
    if not (folder / "train_metadata.csv").exists():
        raise UserError(f"--data {folder}: no train_metadata.csv there; make the folder with python -m src.prepare")
    name, folds = folder.absolute().name, folder / "folds.csv"
    if not folds.exists():
        folds = settings.runs / name / "folds.csv"
        if not folds.exists():
            require_done(fold_stage.main(["--data", str(folder), "--out", str(folds)]), f"{folder} could not be split")
    require_done(cache_stage.main(["--data", str(folder), "--out", str(settings.cache / name)]), f"{folder} could not be cached")
    cache = Cache(settings.cache / name)
    belongs = [sorted(read_folds(folds).items()), cache.config.to_dict(), sorted(cache.damaged), digest_of(read_metadata([folder]).table)]
    if (folder / "train.yaml").exists():
        belongs.append((folder / "train.yaml").read_text(encoding="utf-8"))
    numbers = sorted({fold for fold in read_folds(folds).values() if fold >= 0})
    return DataSet(name, folder, folds, settings.cache / name, noise, tuple(numbers[: n_folds or None]),
                   hashlib.sha256(json.dumps(belongs).encode()).hexdigest()[:10])


def require_done(code: int, why: str) -> None:
    """Raises what ended a stage: an interruption, or else UserError."""
    if code in (130, 143):
        raise KeyboardInterrupt(*([signal.SIGTERM] if code == 143 else []))
    if code:
        raise UserError(why)


class Plan:
    """Which folds are to be trained, in which order."""

    def __init__(self, settings: ExperimentSettings, tables: list[Table], data: dict[str, DataSet], seeds: tuple[int, ...], finished: set[Cell]) -> None:
        self.settings, self.data, self.finished = settings, data, finished
        self.noisy = {name for name, one in data.items() if one.noise}
        self.wanted: dict[Cell, Row] = {}
        self.todo: dict[Cell, Job] = {}
        longest = max(len(one.numbers) for one in data.values())
        # Seed by seed and fold by fold, all rows of each: what an interrupted table holds can be compared.
        for seed in seeds:
            for place in range(longest):
                for table in tables:
                    for one in data.values():
                        for row in table.of(one.name) if place < len(one.numbers) else ():
                            self.add(one, row, seed, one.numbers[place])

    def add(self, one: DataSet, row: Row, seed: int, fold: int) -> None:
        cell = Cell(one.name, row.key(one.name, self.noisy), seed, fold)
        if cell not in self.wanted:
            self.wanted[cell] = row
            if cell not in self.finished:
                self.todo[cell] = self.job(one, row, cell)

    def run(self, row: Row, cell: Cell) -> Path:
        model, split = re.sub(r"[^A-Za-z0-9]+", "_", row.settings().model), self.data[cell.data].split
        return self.settings.runs / cell.data / f"{model}-{cell.key}-{split}-seed{cell.seed}"

    def job(self, one: DataSet, row: Row, cell: Cell) -> Job:
        run = self.run(row, cell)
        argv = [*row.flags, "--data", one.folder, "--folds", one.folds, "--cache", one.cache, "--run", run, "--fold", cell.fold, "--seed", cell.seed,
                "--device", self.settings.device, *share_of_machine(self.settings), "--checkpoint-seconds", "60", "--validate-every", "1000", "--no-pictures"]
        needs, noise = None, one.noise if row.noise else None
        if noise:
            argv += ["--noise", noise]
        if row.source:
            needs = self.source(*row.source, cell.seed)
            argv += ["--init", needs.weights]
        return Job(cell, row, run, one.folder, one.split, noise, tuple(map(str, argv)), self.settings.jobs, needs)

    def source(self, name: str, row: Row, seed: int) -> Job:
        """The training on another data set whose weights are asked for; it is done again where they are gone."""
        one = self.data[name]
        cell = Cell(name, row.key(name, self.noisy), seed, one.numbers[0])
        job = self.todo.get(cell) or self.job(one, row, cell)
        if not job.weights.exists():
            self.todo[cell] = job
        return job


def share_of_machine(settings: ExperimentSettings) -> tuple[object, ...]:
    cores = max(1, usable_cores() // settings.jobs)
    return ("--threads", cores, "--workers", 0 if settings.device == "cpu" else min(8, cores))


def train_all(plan: Plan, results: Results) -> list[Job]:
    """Trains what is to be trained, adding each fold's row as it ends; returns the failed ones. Weights that are scored
    are deleted, unless a training to come begins with them."""
    todo, failed = dict(plan.todo), []
    workers, used = Workers(plan.settings.jobs), Counter(job.needs.cell for job in todo.values() if job.needs)

    def spare(cell: Cell, folder: Path) -> None:
        if plan.settings.keep_weights and (folder / "weights.safetensors").exists():
            (folder / KEPT).touch()
        if not used[cell] and not (folder / KEPT).exists():
            for name in ("weights", "golden_windows"):
                (folder / f"{name}.safetensors").unlink(missing_ok=True)

    for cell in plan.finished & plan.wanted.keys():  # what an interruption left
        spare(cell, plan.run(plan.wanted[cell], cell) / f"fold{cell.fold}")
    try:
        with progress(total=len(todo), what="experiments", unit="fold") as bar:
            while True:
                for job in list(todo.values()):
                    if workers.idle and (job.needs is None or job.needs.weights.exists()):
                        workers.submit(todo.pop(job.cell))
                if not workers.busy:
                    break  # the rest would begin with weights whose training failed
                for job, row in workers.next():
                    bar.update()
                    if row is None:
                        failed.append(job)
                        say(f"failed: {job.row.name} on {job.cell.data}, seed {job.cell.seed}, fold {job.cell.fold}; see {job.log}: {job.why()}")
                        continue
                    results.add(row)
                    used -= Counter([job.needs.cell]) if job.needs else Counter()
                    for one in filter(None, (job, job.needs)):
                        spare(one.cell, one.folder)
    finally:
        workers.close()
    return failed + list(todo.values())


def measure_speed(settings: ExperimentSettings, tables: list[Table]) -> None:
    """Adds what is missing in experiments_speed.csv."""
    file, threads = settings.results / "experiments_speed.csv", usable_cores()
    speeds = read_table(file, SPEED)
    networks = {row.network(): row for table in tables for row in table.rows}
    for network in progress([name for name in networks if name not in set(speeds.network)], what="speed", unit="model"):
        chosen = networks[network].settings()
        model = create_model(chosen.model, N_CLASSES, AudioConfig(), replace(chosen.network, drop_path=0.0))
        rate = cpu_windows_per_second(model, AudioConfig(), threads)
        speeds.loc[len(speeds)] = [network, float(f"{rate:.4g}"), threads, device_name(torch.device("cpu"))]
        write_table(file, speeds, FLOATS)


def completed(settings: ExperimentSettings) -> ExperimentSettings:
    """The settings with their automatic ones chosen."""
    if not settings.tables:
        raise UserError(f"name one or more of {', '.join(TABLES)}, or all")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    cores = usable_cores()
    jobs = settings.jobs or max(1, min(8, cores if device == "cpu" else cores // 2))
    tables = dict.fromkeys(name for table in settings.tables for name in (PAPER if table == "all" else (table,)))
    return replace(settings, device=device, jobs=jobs, tables=tuple(tables))


def only(tables: list[Table], names: Collection[str]) -> list[Table]:
    """The tables with these rows alone. Raises UserError for a row that none of them has."""
    known = {row.name for table in tables for row in table.rows}
    if unknown := sorted(set(names) - known):
        raise UserError(f"--rows {', '.join(unknown)}: no such row; there are {', '.join(sorted(known))}")
    wanted = {*names, *(row.against for table in tables for row in table.rows if row.name in names)}
    return [replace(table, rows=tuple(row for row in table.rows if row.name in wanted)) for table in tables]


@resumable
def main(argv: list[str] | None = None) -> int:
    settings = completed(parse(ExperimentSettings, argv, prog="python -m src.experiments", description=__doc__))
    budget, results = budget_of(settings), Results(settings.results)
    names = [folder.absolute().name for folder in settings.data] or sorted(set(results.table.data) if settings.only_report else ())
    if not names or len(set(names)) < len(names):
        raise UserError("--data names the data sets, two or more of them by different names")
    noise = noise_of(settings, names)
    tables = [TABLES[name](budget, names) for name in settings.tables]
    chosen = only(tables, settings.rows) if settings.rows else tables
    for table in tables:
        for row in table.rows:
            row.settings()  # raises for a flag that src.train does not take
    failed: list[Job] = []
    data: dict[str, DataSet] = {}
    with owned(settings.results):
        results = Results(settings.results)  # what another process wrote until now is there
        if not settings.only_report:
            with owned(settings.runs):
                data = {name: open_data(settings, folder, noise.get(name), budget.n_folds) for name, folder in zip(names, settings.data)}
                for one in data.values():
                    results.check_split(one.name, one.split)
                plan = Plan(settings, chosen, data, budget.seeds, results.finished())
                say(f"{', '.join(settings.tables)}: {len(plan.wanted)} folds of {len({(c.data, c.key, c.seed) for c in plan.wanted})} runs, "
                    f"{len(plan.wanted.keys() & plan.finished)} finished, {len(plan.todo)} to train, {settings.jobs} side by side on {settings.device}")
                failed = train_all(plan, results)
        if settings.speed:
            measure_speed(settings, chosen)
        for table in tables:
            written = write_report(table, budget, names, results, noise.keys() if settings.data else results.noisy(), settings.results,
                                   folds={name: one.numbers for name, one in data.items()})
            say(f"wrote {settings.results / stem_of(table, budget)}.md, .csv and .png" if written else
                f"{table.name}: nothing of it is trained under this budget")
    if failed:
        say(f"{len(failed)} trainings failed; the same command tries them again")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
