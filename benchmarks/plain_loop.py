"""The same network, recordings, folds and epochs: this project's trainer against the loop that one writes on a first evening.

    python -m benchmarks.plain_loop --data DATA [--metadata FILE] [--noise DIR] [--folds FILE --cache DIR] [--fold 0 1] [--epochs 30] [--workers 8]

The plain loop: a torch Dataset that decodes a random 5 s with librosa, log-mel in decibels, normalised and resized; a shuffled DataLoader,
AdamW with a cosine, binary cross-entropy, timm's mixup where asked; on a GPU bf16 autocast and pinned batches.
Both make as many crops an epoch: the loop one of each training recording, the trainer of recordings drawn with replacement, rarer species more
often. Both score a held-out one by the mean over its consecutive windows.
Speeds are medians over the epochs after the first. Neither validates before its end: the trainer's loader would work ahead meanwhile.
Writes plain_loop.md; finished folds are not trained again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from benchmarks.machine import about
from benchmarks.real_birds import call, paired_gain
from src import devices, metrics
from src.cache import Cache
from src.config import AudioConfig, differences
from src.console import UserError, progress, resumable, say
from src.dataset import SCORED_SECONDS
from src.evaluate import NAMES, read_oof
from src.folds import read_folds
from src.metadata import read_metadata, targets
from src.models.torchvision_guard import import_timm
from src.settings import flatten, parse
from src.storage import write_json, write_table, write_text


@dataclass(frozen=True)
class PlainSettings:
    data: Path = Path("input/birds")
    metadata: Path | None = None
    noise: Path | None = None
    """Background noise for the trainer; the plain loop has none."""
    folds: Path | None = None
    """A fold table; by default made with src.folds."""
    cache: Path | None = None
    """A finished cache of the data; by default made with src.cache."""
    fold: tuple[int, ...] = (0, 1)
    run: Path = Path("runs/plain_loop")
    model: str = "efficientnet_b0"
    """A name that both this project and timm know."""
    input_side: int = 128
    epochs: int = 30
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    drop_path: float = 0.2
    mixup_alpha: float = 0.0
    """The plain loop's, by timm's Mixup; 0: none."""
    workers: int = -1
    """Loader processes of both; -1: as src.train's."""
    threads: int = 2
    device: str = "auto"
    """auto, cpu or cuda."""
    resamples: int = 1000
    """Of the paired bootstrap over recordings."""
    results: Path = Path("benchmarks/results")


class RandomCrops(Dataset):
    """One random window of each recording: (image (1, side, side) float32, class)."""

    def __init__(self, paths: list[str], labels: np.ndarray, side: int) -> None:
        self.paths, self.labels, self.side, self.audio = paths, labels, side, AudioConfig()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        spare = max(0.0, librosa.get_duration(path=self.paths[item]) - self.audio.window_seconds)
        offset = float(torch.rand(())) * spare
        sound, _ = librosa.load(self.paths[item], sr=self.audio.sample_rate, offset=offset, duration=self.audio.window_seconds)
        return image(sound, self.audio, self.side), int(self.labels[item])


def image(sound: np.ndarray, audio: AudioConfig, side: int) -> Tensor:
    """(n,) -> (1, side, side): log-mel of one window, repeated where it is shorter, normalised by its own mean and deviation."""
    sound = np.resize(sound, round(audio.window_seconds * audio.sample_rate))
    power = librosa.feature.melspectrogram(y=sound, sr=audio.sample_rate, n_fft=audio.n_fft, hop_length=audio.hop_length, n_mels=audio.n_mels,
                                           win_length=audio.win_length, window="hamming", fmin=audio.fmin, fmax=audio.fmax)
    db = librosa.power_to_db(power, ref=np.max)
    db = (db - db.mean()) / (db.std() + 1e-6)
    return F.interpolate(torch.from_numpy(db)[None, None], size=(side, side), mode="bilinear", antialias=True)[0]


def train_plainly(paths: list[str], labels: np.ndarray, n_classes: int, settings: PlainSettings, device: torch.device) -> tuple[nn.Module, float]:
    """The trained network and the median over the epochs after the first of crops a second."""
    timm, on_gpu = import_timm(), device.type == "cuda"
    torch.manual_seed(0)
    model = timm.create_model(settings.model, in_chans=1, num_classes=n_classes, drop_path_rate=settings.drop_path).to(device)
    workers = devices.loader_workers(settings.workers, on_gpu=on_gpu)
    loader = DataLoader(RandomCrops(paths, labels, settings.input_side), settings.batch_size, shuffle=True, drop_last=True,
                        num_workers=workers, persistent_workers=workers > 0, pin_memory=on_gpu)
    optimiser = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs * len(loader))
    mixup = timm.data.Mixup(settings.mixup_alpha, prob=0.5, label_smoothing=0.0, num_classes=n_classes) if settings.mixup_alpha else None
    speeds = []
    for _ in progress(range(settings.epochs), what="plain loop", unit="epoch"):
        model.train()
        began = time.perf_counter()
        for images, classes in loader:
            images, classes = images.to(device, non_blocking=True), classes.to(device, non_blocking=True)
            images, target = mixup(images, classes) if mixup else (images, F.one_hot(classes, n_classes).float())
            with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
                loss = F.binary_cross_entropy_with_logits(model(images).float(), target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        loss.item()  # a GPU has finished only now
        speeds.append(len(loader) * settings.batch_size / (time.perf_counter() - began))
    return model, after_the_first(speeds)


def after_the_first(speeds: list[float]) -> float:
    """The median; the first epoch warms up: imports, workers, kernels."""
    return float(np.median(speeds[1:] or speeds))


@torch.inference_mode()
def predict_plainly(model: nn.Module, paths: list[str], settings: PlainSettings, device: torch.device) -> np.ndarray:
    """(n, C) each recording's probability: the mean over the consecutive windows of its first minute, as many as the trainer's."""
    audio, rows = AudioConfig(), []
    n = round(audio.window_seconds * audio.sample_rate)
    for path in progress(paths, what="held out", unit="file"):
        sound, _ = librosa.load(path, sr=audio.sample_rate, duration=SCORED_SECONDS)
        n_windows = max(1, round(len(sound) / n))
        if len(sound) > n:
            sound = np.pad(sound, (0, n))  # silence behind the last window
        windows = [image(sound[n * k : n * (k + 1)], audio, settings.input_side) for k in range(n_windows)]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            rows.append(model.eval()(torch.stack(windows).to(device)).float().sigmoid().mean(0).cpu().numpy())
    return np.stack(rows)


def train_with_the_trainer(fold: int, folds: Path, cache: Path, settings: PlainSettings) -> float:
    """Trains the fold with src.train and returns the median over the epochs after the first of the crops a second that it prints."""
    words = [*inputs(settings), "--folds", folds, "--cache", cache, "--run", settings.run / "trainer", "--fold", fold, "--model", settings.model,
             "--input-side", settings.input_side, "--epochs", settings.epochs, "--batch-size", settings.batch_size, "--learning-rate", settings.learning_rate,
             "--weight-decay", settings.weight_decay, "--drop-path", settings.drop_path, "--workers", settings.workers, "--threads", settings.threads,
             "--device", settings.device, "--validate-every", settings.epochs, *(["--noise", settings.noise] if settings.noise else [])]
    say(f"\n$ python -m src.train {' '.join(map(str, words))}")
    speeds = []
    with subprocess.Popen([sys.executable, "-m", "src.train", *map(str, words)], stdout=subprocess.PIPE, text=True) as trainer:
        for line in trainer.stdout:
            say(line.rstrip())
            speeds += map(float, re.findall(r"([\d.]+) crops/s", line))
    if trainer.returncode:
        raise UserError("src.train failed")
    if not speeds:
        raise UserError(f"{settings.run}/trainer/fold{fold} was finished before its speed was noted; remove {settings.run} and begin anew")
    return after_the_first(speeds)


def inputs(settings: PlainSettings) -> list[object]:
    return ["--data", settings.data, *(["--metadata", settings.metadata] if settings.metadata else [])]


def one_fold(fold: int, table: pd.DataFrame, fold_of: dict[str, int], classes: tuple[str, ...], folds: Path, cache: Path, settings: PlainSettings) -> dict:
    """Trains a fold both ways, unless that is done: crops a second of both. The plain predictions lie in plain/fold<k>/oof.csv."""
    folder = settings.run / "plain" / f"fold{fold}"
    if (folder / "speed.json").exists():
        return json.loads((folder / "speed.json").read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    trainer_speed = train_with_the_trainer(fold, folds, cache, settings)
    held_out = table.filename.map(fold_of) == fold
    device = devices.choose_device(settings.device)
    labels = table.primary_label.map({label: number for number, label in enumerate(classes)}).to_numpy()
    model, speed = train_plainly(table.path[~held_out].tolist(), labels[~held_out], len(classes), settings, device)
    oof = pd.DataFrame(predict_plainly(model, table.path[held_out].tolist(), settings, device), columns=list(classes))
    oof.insert(0, "filename", table.filename[held_out].to_numpy())
    write_table(folder / "oof.csv", oof, float_format="%.9g")
    speeds = {"trainer": trainer_speed, "plain": speed}
    write_json(folder / "speed.json", speeds)
    return speeds


def prepare(settings: PlainSettings) -> tuple[Path, Path]:
    """The fold table and the cache, made where they are missing. Raises UserError where the run folder holds other settings."""
    given, file = json.loads(json.dumps(flatten(replace(settings, resamples=0, fold=(), results=Path())))), settings.run / "settings.json"
    if file.exists() and (changed := differences(json.loads(file.read_text(encoding="utf-8")), given)):
        raise UserError(f"{settings.run} holds another comparison ({'; '.join(changed)}); name another --run")
    settings.run.mkdir(parents=True, exist_ok=True)
    write_json(file, given)
    folds, cache = settings.folds or settings.run / "folds.csv", settings.cache or settings.run / "cache"
    if settings.folds is None:
        call("src.folds", *inputs(settings), "--out", folds)
    if settings.cache is None:
        call("src.cache", *inputs(settings), "--out", cache)
    return folds, cache


@resumable
def main(argv: list[str] | None = None) -> None:
    settings = parse(PlainSettings, argv, prog="python -m benchmarks.plain_loop", description=__doc__)
    torch.set_num_threads(settings.threads)
    folds, cache = prepare(settings)
    metadata, fold_of = read_metadata((settings.data,), settings.metadata), read_folds(folds)
    chosen = metadata.table.filename.isin(Cache(cache).names) & (metadata.table.filename.map(fold_of) != -2)  # -2: left out
    table = metadata.table[chosen].reset_index(drop=True)
    device = devices.choose_device(settings.device)
    workers = devices.loader_workers(settings.workers, on_gpu=device.type == "cuda")
    say(f"{len(table)} recordings, {len(metadata.classes)} classes, folds {', '.join(map(str, settings.fold))}; {settings.threads} CPU threads")
    speeds = [one_fold(fold, table, fold_of, metadata.classes, folds, cache, settings) for fold in settings.fold]
    classes = list(metadata.classes)
    ours = pd.concat([read_oof(settings.run / "trainer" / f"fold{fold}", classes) for fold in settings.fold], ignore_index=True)
    theirs = pd.concat([read_oof(settings.run / "plain" / f"fold{fold}", classes) for fold in settings.fold]).set_index("filename").loc[ours.filename]
    target, _ = targets(table.set_index("filename").loc[ours.filename].reset_index(), metadata.classes)
    probability, plain = ours[classes].to_numpy(), theirs[classes].to_numpy()
    scores, plain_scores = (metrics.score(target, p, resamples=settings.resamples) for p in (probability, plain))
    gain = paired_gain(target, probability, plain, settings.resamples)
    speed, plain_speed = (float(np.mean([fold[name] for fold in speeds])) for name in ("trainer", "plain"))
    given = flatten(settings)
    words = " ".join(f"--{name.replace('_', '-')} {' '.join(map(str, given[name])) if name == 'fold' else given[name]}"
                     for name in ("fold", "model", "input_side", "epochs", "batch_size", "mixup_alpha", "workers", "threads"))
    lines = ["# The trainer beside a plain loop", "", about(f"python -m benchmarks.plain_loop {words}", device), "",
             f"{len(ours)} held-out recordings of {len(classes)} classes; `{settings.model}` from scratch, {settings.epochs} epoch(s). "
             f"Trainer: its default augmentation{', background noise' if settings.noise else ''}. "
             f"Plain loop: librosa, shuffled, {'timm mixup' if settings.mixup_alpha else 'no augmentation'}. "
             f"Both: batches of {settings.batch_size}, {workers or 'no'} loader process(es), {settings.threads} CPU thread(s), "
             f"{'bf16' if device.type == 'cuda' else 'fp32'}. Intervals: 95 % bootstraps over recordings; the gain's is paired. "
             "Crops a second: medians over the epochs after the first, mean of the folds.", "",
             "| | trainer | plain loop | gain |", "|---|---|---|---|",
             *(f"| {NAMES[key]} | {scores[key]} | {plain_scores[key]} | {gain.get(key, '')} |" for key in ("top1", "macro_ap", "macro_roc_auc", "padded_cmap")),
             f"| crops a second | {speed:.1f} | {plain_speed:.1f} | {speed / plain_speed:.2f} times |", ""]
    write_text(settings.results / "plain_loop.md", "\n".join(lines))
    say("\n" + "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
