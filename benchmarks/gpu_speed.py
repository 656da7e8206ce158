"""What a training does with a GPU: crops a second of its step alone and with its loader, share of the bf16 peak, peak memory.

    python -m benchmarks.gpu_speed [--models asca_0 efficientnet_b0 ...] [--compile] [--data DATA --noise DIR [--metadata FILE] [--cache CACHE]]
    python -m benchmarks.gpu_speed --device cpu --models asca_test --batch-size 4 --steps 2 --matrix-side 512     # a trial on a CPU

What is timed are src.train's own epochs, its step being: decibels from uint8, mixup, forward, backward, clipping, AdamW. Alone, it works on
one batch that lies on the device; with the loader, on what this makes of a real cache, behind a first epoch that uses up what its processes had
worked ahead. The peak is a large bf16 matrix product's, in the same run. Without --data it makes the demo's recordings. Writes gpu_speed.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import about
from src import devices
from src.cache import Cache, build
from src.config import AudioConfig
from src.console import UserError, say, stage
from src.demo_data import make
from src.fold_training import FoldTraining
from src.metadata import Metadata, read_metadata
from src.models import ModelSettings, create_model
from src.network_cost import count_gmacs
from src.settings import parse
from src.storage import write_text
from src.train_settings import TrainSettings

EPOCHS = range(1, 4)  # 1 warms up, 2 is timed, 3 is what the loader works ahead into; 0 would draw its first batch


@dataclass(frozen=True)
class SpeedSettings:
    models: tuple[str, ...] = ("asca_0", "efficientnet_b0", "eca_nfnet_l0", "asca_nano")
    batch_size: int = 128
    n_classes: int = 264
    input_side: int = 224
    steps: int = 36
    """Of each epoch; more than the loader's processes work ahead (two batches each)."""
    device: str = "auto"
    precision: str = "auto"
    workers: int = -1
    """Loader processes; -1: as src.train's."""
    threads: int = 0
    compile: bool = False
    """The same with torch.compile: about a minute more for each model."""
    search: bool = False
    """cuDNN's search for its fastest kernels, which src.train leaves out: it can take most of a minute a network."""
    matrix_side: int = 8192
    """Of the matrix product that gives the peak."""
    data: tuple[Path, ...] = ()
    metadata: Path | None = None
    cache: Path | None = None
    """A finished cache of the data; by default made in a temporary folder."""
    noise: Path | None = None
    """Background noise; needed with --data."""
    results: Path = Path("benchmarks/results")


@dataclass(frozen=True)
class Inputs:
    metadata: Metadata
    cache: Cache
    noise: Path
    folder: Path  # for what a training writes


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_tflops(device: torch.device, side: int) -> float:
    """The best of ten bf16 products of two random (side, side) matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(10):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        seconds.append(time.perf_counter() - began)
    return 2 * side**3 / min(seconds) / 1e12


def network_of(settings: SpeedSettings) -> ModelSettings:
    """src.train's defaults, at the size that is measured."""
    return replace(TrainSettings().network, input_side=settings.input_side)


def training_of(model: str, inputs: Inputs, accelerator, settings: SpeedSettings) -> FoldTraining:
    """A training of src.train, in epochs of `steps` full batches however few the recordings; one recording is held out."""
    folds = {name: int(number > 0) for number, name in enumerate(inputs.metadata.table.filename)}
    options = TrainSettings(run=inputs.folder / model.replace(":", "_"), model=model, batch_size=settings.batch_size, epochs=len(EPOCHS), noise=inputs.noise,
                            workers=settings.workers, compile=settings.compile, network=network_of(settings))
    training = FoldTraining(options, 0, inputs.metadata, folds, inputs.cache, accelerator)
    training.sampler.batch_size, training.sampler.n_batches = settings.batch_size, settings.steps
    return training


def trained_per_second(training: FoldTraining, batches: Iterator[dict[str, Tensor]]) -> float:
    """Crops a second of epoch 2, behind epoch 1."""
    training.epoch(1, batches)
    began = time.perf_counter()
    training.epoch(2, batches)  # has read the last loss when it ends: the device is done
    return training.sampler.n_batches * training.sampler.batch_size / (time.perf_counter() - began)


def made_per_second(training: FoldTraining) -> float:
    """Crops a second that the loader makes where nothing trains, of epoch 2 behind epoch 1."""
    batches, n = iter(training.loader(EPOCHS)), training.sampler.n_batches
    for _ in range(n):
        next(batches)
    began = time.perf_counter()
    for _ in range(n):
        next(batches)
    return n * training.sampler.batch_size / (time.perf_counter() - began)


def measure(model: str, peak: float, inputs: Inputs, accelerator, settings: SpeedSettings) -> str:
    """The model's line of the table."""
    device, audio = accelerator.device, inputs.cache.config
    devices.release(accelerator)  # of the model before
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    training = training_of(model, inputs, accelerator, settings)
    parameters = sum(p.numel() for p in training.model.parameters()) / 1e6
    training.record()
    batch = next(iter(training.loader(range(1))))
    on_device = {name: tensor if name == "row" else tensor.to(device) for name, tensor in batch.items()}
    training.epoch(1, repeat(on_device))  # warms up
    alone = trained_per_second(training, repeat(on_device))
    memory = f"{torch.cuda.max_memory_reserved(device) / 2**30:.1f}" if device.type == "cuda" else "-"
    mixed = trained_per_second(training, iter(training.loader(EPOCHS)))
    training.crops.waveform_augment = None
    cached = trained_per_second(training, iter(training.loader(EPOCHS)))
    network = create_model(model, settings.n_classes, audio, network_of(settings)).eval()
    gmacs = count_gmacs(network, torch.zeros(1, 1, audio.n_mels, audio.window_frames))
    cells = (model, f"{parameters:.1f}", f"{gmacs:.2f}", f"{alone:,.0f}", f"{6 * gmacs * alone / 1e3 / peak:.1%}", memory,
             *(f"{speed:,.0f} ({speed / alone - 1:+.1%})" for speed in (cached, mixed)))
    return f"| {' | '.join(cells)} |"


def inputs_of(settings: SpeedSettings, root: Path, workers: int) -> Inputs:
    """The recordings, their cache and noise, made below `root` where none are given; classes are added until there are `n_classes`."""
    if not settings.data:
        make(root / "demo")
    data, noise = settings.data or (root / "demo",), settings.noise or root / "demo" / "noise"
    table = read_metadata(data, settings.metadata).table
    cache = Cache(settings.cache) if settings.cache else build(table, root / "cache", AudioConfig(), workers=max(1, workers))
    labels = sorted(set(table.primary_label))
    unheard = [f"class {number}" for number in range(settings.n_classes - len(labels))]
    return Inputs(Metadata(table[table.filename.isin(cache.names)].reset_index(drop=True), (*labels, *unheard)), cache, noise, root / "runs")


def report(rows: list[str], peak: float, loader: str, accelerator, settings: SpeedSettings) -> str:
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    words = " ".join(("--models", *settings.models, "--batch-size", str(settings.batch_size), "--steps", str(settings.steps), *["--compile"] * settings.compile,
                      *["--search"] * settings.search))
    lines = ["# Training speed", "", about(f"python -m benchmarks.gpu_speed {words}", accelerator.device), "",
             f"Batches of {settings.batch_size}, {settings.input_side} x {settings.input_side}, {settings.n_classes} classes, "
             f"{precision}{', torch.compile' * settings.compile}; epochs of {settings.steps} steps. Step alone: on a batch that lies on the device. "
             "In brackets: against the step alone. Share of the peak: GMACs x 2 x 3 x crops a second, step alone, over the "
             f"{peak:.3g} TFLOP/s of a {settings.matrix_side}-wide bf16 matrix product. {loader}.", "",
             "| model | parameters, M | GMACs | step alone, crops/s | share of the bf16 peak | peak memory, GiB | trained from the cache, crops/s | "
             "a quarter as waveforms, crops/s |", "|---|---|---|---|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(SpeedSettings, argv, prog="python -m benchmarks.gpu_speed", description=__doc__)
    if settings.data and settings.noise is None:
        raise UserError("--data needs --noise: a folder of background noise")
    began = time.perf_counter()
    devices.keep_freed_memory()
    accelerator = devices.start(device=settings.device, precision=settings.precision, accumulate=1, threads=settings.threads)
    device, torch.backends.cudnn.benchmark = accelerator.device, settings.search
    workers = devices.loader_workers(settings.workers, on_gpu=device.type == "cuda")
    with tempfile.TemporaryDirectory() as root:
        inputs, rows = inputs_of(settings, Path(root), workers), []
        peak = peak_tflops(device, settings.matrix_side)
        smallest = training_of("asca_test", inputs, accelerator, settings)
        made = [made_per_second(smallest)]
        smallest.crops.waveforms.samples = None  # as where the recordings do not fit into memory
        made.append(made_per_second(smallest))
        smallest.crops.waveform_augment = None
        made.append(made_per_second(smallest))
        loader = ("The loader alone ({} processes, {} recordings) makes {:,.0f} crops a second from the cache; with a quarter as waveforms under background "
                  "noise {:,.0f}, where each is read from its file {:,.0f}").format(workers or "no", len(inputs.metadata.table), made[2], made[0], made[1])
        say(f"bf16 peak {peak:.3g} TFLOP/s. {loader} ({time.perf_counter() - began:.0f} s)")
        for model in settings.models:
            rows.append(measure(model, peak, inputs, accelerator, settings))
            say(f"{rows[-1]} ({time.perf_counter() - began:.0f} s)")
            text = report(rows, peak, loader, accelerator, settings)
            write_text(settings.results / "gpu_speed.md", text)  # after each model: time on a lent GPU may end
    say(f"\n{text}\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
