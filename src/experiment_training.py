"""Worker processes that train one fold of an experiment after the other: by src.train, its output in a log; scored, its cost counted."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import multiprocessing
import threading
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from tqdm import tqdm

from . import metrics, train
from .config import AudioConfig
from .console import begin_worker, say
from .evaluate import read_oof, truth_of
from .experiment_results import Cell, packed
from .metadata import read_metadata
from .models import ModelSettings, create_model
from .network_cost import count_gmacs, made_log_mel
from .paper_tables import Row
from .run_config import read_config


@dataclass(frozen=True)
class Job:
    """A fold to train. Sent to a worker whole."""

    cell: Cell
    row: Row
    run: Path
    data: Path
    split: str
    noise: Path | None
    argv: tuple[str, ...]  # of src.train
    jobs: int  # side by side
    needs: Job | None = None  # whose weights it begins with

    @property
    def folder(self) -> Path:
        return self.run / f"fold{self.cell.fold}"

    @property
    def weights(self) -> Path:
        return self.folder / "weights.safetensors"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def why(self) -> str:
        """The last line of the log."""
        return next(iter(reversed(self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines())), "") if self.log.exists() else ""


def begin() -> None:
    """A worker's first act; a loader's processes start as usual here."""
    begin_worker()
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # not spawned because this one was
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a worker that is ended would leave behind


def train_and_score(job: Job) -> dict | None:
    """The job's row of experiments.csv, or None where the training failed and its log says why. Raises OSError where that cannot be written."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            return score(job) if train.main(list(job.argv)) == 0 else None
        except Exception:  # whatever it is costs this training alone
            traceback.print_exc()
            return None
        finally:
            gc.collect()
            gc.freeze()  # what is left are modules: later collections, one a training at least, pass over them
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # for the trainings beside this one


def score(job: Job) -> dict:
    config, settings = read_config(job.folder), job.row.settings()
    table, metadata = read_oof(job.folder, config["classes"]).sort_values("filename"), read_metadata([job.data])
    truth, probability = truth_of(table.filename, metadata, config), table[config["classes"]].to_numpy()
    found = metrics.score(truth, probability, resamples=0)
    parameters, gmacs = cost(settings.model, len(config["classes"]), json.dumps(config["audio"]), settings.network)
    timing = json.loads((job.folder / "timing.json").read_text(encoding="utf-8"))
    cell = job.cell
    return {"data": cell.data, "split": job.split, "key": cell.key, "row": job.row.name, "noise": str(job.noise is not None), "seed": cell.seed,
            "fold": cell.fold, "held_out": len(table), "training": config["recordings"]["training"], **{name: found[name].value for name in metrics.NAMES},
            "parameters": parameters, "gmacs": gmacs, "train_seconds": sum(timing["seconds"]), "device": timing["device"], "jobs": job.jobs,
            "network": job.row.network(), "epochs": settings.epochs, "input_side": settings.network.input_side, "commit": config["versions"]["commit"],
            "hits": packed(metrics.top1(truth, probability))}


@functools.cache
def cost(model: str, n_classes: int, audio: str, network: ModelSettings) -> tuple[int, float]:
    """Parameters, and GMACs of one window."""
    config = AudioConfig.from_dict(audio)
    made = create_model(model, n_classes, config, replace(network, drop_path=0.0)).eval()
    return sum(p.numel() for p in made.parameters()), count_gmacs(made, made_log_mel(1, config))


class Workers:
    """One process a training, side by side and used again: the imports and the GPU's start are paid once. One that dies costs its training alone."""

    def __init__(self, jobs: int) -> None:
        self.idle = [self.new() for _ in range(jobs)]
        self.busy: dict[Future, tuple[ProcessPoolExecutor, Job]] = {}
        self.processes: set[BaseProcess] = set()

    @staticmethod
    def new() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=begin)

    def submit(self, job: Job) -> None:
        worker, others = self.idle.pop(), set(multiprocessing.active_children())
        self.busy[worker.submit(train_and_score, job)] = worker, job
        self.processes |= set(multiprocessing.active_children()) - others  # it starts with its first training

    def next(self) -> list[tuple[Job, dict | None]]:
        """Waits for the next trainings to end: (job, its row or None)."""
        ended = []
        for future in wait(self.busy, return_when=FIRST_COMPLETED).done:
            worker, job = self.busy.pop(future)
            try:
                ended.append((job, future.result()))
            except BrokenProcessPool:
                ended.append((job, None))
                worker = self.new()
            except OSError as error:  # a full disk: the training that met it is lost, no other
                ended.append((job, None))
                say(f"{job.log}: {error.strerror or error}")
            self.idle.append(worker)
        return ended

    def close(self) -> None:
        """Ends what is still running; a training keeps its last checkpoint."""
        for _ in range(2):  # first the trainings, which end well and leave their workers idle, then these
            for process in self.processes:
                process.terminate()
            wait(self.busy)
        for worker in [*self.idle, *(worker for worker, _ in self.busy.values())]:
            worker.shutdown()
