"""STAGE 3: metadata + folds + cache -> runs/<run>/fold<k>/: weights, config, history, curves, out-of-fold predictions."""

from __future__ import annotations

import math
import os
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import metrics, plots
from .augment import AugmentSettings, mix
from .cache import Cache
from .checkpoint import load_tensors, optimiser_tensors, restore_optimiser, save_tensors
from .config import differences
from .console import UserError, progress, say, stage
from .dataset import BalancedSampler, Crops, HeldOutWindows, as_is, sampling_share, to_log_mel
from .folds import read_folds
from .losses import Loss, multi_label_loss
from .metadata import Metadata, SecondaryLabels, read_metadata, targets
from .models import ModelSettings, create_model
from .models.torchvision_guard import import_timm
from .predict import choose_device, keep_freed_memory, predict
from .run_config import comparable, read_config, versions
from .settings import flatten, parse
from .storage import atomic, owned, write_text

GOLDEN_WINDOWS = 16  # held-out windows kept beside the weights: the export is checked on them


@dataclass(frozen=True)
class TrainSettings:
    data: tuple[Path, ...] = (Path("input/birdclef-2023"),)
    """Folders in BirdCLEF's layout; further ones are always in training."""
    folds: Path = Path("folds/birdclef-2023.csv")
    cache: Path = Path("input/cache/birdclef-2023")
    run: Path = Path("runs/asca")
    fold: tuple[str, ...] = ("0",)
    """One, several, or all."""
    metadata: Path | None = None
    """Another table in train_metadata.csv's columns for the first folder."""
    noise: Path | None = None
    """A folder of background noise, mixed in on the waveform path."""
    model: str = "asca_nano"
    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    """At the end of the warm-up; a cosine takes it to 0."""
    warmup_epochs: float = 2.0
    weight_decay: float = 0.05
    """AdamW's, on weights of two or more dimensions."""
    clip_gradient: float = 1.0
    """The gradient's largest norm; 0: not clipped."""
    ema_decay: float = 0.0
    """Of the moving average of the weights, which is then what is scored and kept; it warms up from 0. 0: off."""
    loss: Loss = "bce"
    label_smoothing: float = 0.0
    """A target of 1 becomes 1 - smoothing."""
    sampling_power: float = 0.5
    """A recording is drawn in proportion to (class count / all)^-power; 0: all alike."""
    use_rating: bool = False
    """Draw well rated recordings more often."""
    secondary_labels: SecondaryLabels = "ignore"
    """ignore (the paper), mask (out of the loss), soft, or hard."""
    secondary_weight: float = 0.5
    """The target of a soft secondary label."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    seed: int = 0
    device: str = "auto"
    workers: int = -1
    """Loader processes; -1: none on a CPU, one a core (at most 8) beside a GPU."""
    threads: int = 0
    """Of the CPU; 0: all cores."""
    restart: bool = False
    """Begin anew, also where the run folder holds other settings."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    network: ModelSettings = field(default_factory=ModelSettings)


class Diverged(UserError):
    """The loss is no number."""


def learning_rate_at(step: int, settings: TrainSettings, steps_per_epoch: int) -> float:
    """Linear warm-up, then a cosine to 0 (Loshchilov & Hutter 2017), by optimiser step."""
    warmup, total = round(settings.warmup_epochs * steps_per_epoch), settings.epochs * steps_per_epoch
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def optimiser_for(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW; biases, norms and position tables are not decayed."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "relative_position" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim < 2 or "relative_position" in name]
    fused = next(model.parameters()).is_cuda
    return torch.optim.AdamW([{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                             lr=settings.learning_rate, fused=fused)


class FoldTraining:
    """Everything one fold needs, and its state: model, optimiser, history."""

    def __init__(self, settings: TrainSettings, fold: int, metadata: Metadata, folds: dict[str, int], cache: Cache) -> None:
        self.settings, self.fold, self.cache = settings, fold, cache
        self.folder = settings.run / f"fold{fold}"
        table = metadata.table[metadata.table.filename.isin(cache.names)].reset_index(drop=True)
        of = np.where(table.is_extra, -1, table.filename.map(folds).fillna(-2)).astype(int)
        self.training, self.held_out = table[(of != fold) & (of != -2)].reset_index(drop=True), table[of == fold].reset_index(drop=True)
        self.classes = metadata.classes
        self.device = choose_device(settings.device, settings.precision)
        target, weight = targets(self.training, self.classes, settings.secondary_labels, settings.secondary_weight)
        self.prior = target.mean(axis=0).clip(1e-6, 1 - 1e-6)
        self.crops = Crops(self.training, cache, target, weight, settings=settings.augment, noise=settings.noise, seed=settings.seed)
        share = sampling_share(self.training, power=settings.sampling_power, use_rating=settings.use_rating)
        self.sampler = BalancedSampler(share, settings.batch_size, settings.seed)
        torch.manual_seed(settings.seed)
        self.model = create_model(settings.model, len(self.classes), cache.config, settings.network)
        self.model.to(self.device.torch, memory_format=torch.channels_last)
        self.ema = import_timm().utils.ModelEmaV3(self.model, decay=settings.ema_decay, use_warmup=True) if settings.ema_decay else None
        self.kept = self.ema.module if self.ema else self.model  # what is scored, and kept in the end
        self.optimiser = optimiser_for(self.model, settings)
        self.scaler = torch.amp.GradScaler(self.device.torch.type, enabled=self.device.amp == torch.float16)
        self.history: list[dict] = []
        self.config = {"settings": flatten(replace(settings, restart=False)) | {"fold": [str(fold)]}, "audio": cache.config.to_dict(),
                       "classes": list(self.classes), "prior": [float(f"{p:.6g}") for p in self.prior],
                       "recordings": {"training": len(self.training), "held_out": len(self.held_out)},
                       "versions": versions()}

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()} | optimiser_tensors(self.optimiser)
        if self.ema:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.module.state_dict().items()}
        save_tensors(self.checkpoint, tensors, {"history": self.history, "scaler": self.scaler.state_dict()})

    def resume(self) -> None:
        tensors, facts = load_tensors(self.checkpoint)
        for prefix, module in {"model.": self.model, "ema.": self.kept}.items():
            part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if part:
                module.load_state_dict(part)
        restore_optimiser(self.optimiser, tensors)
        self.history = facts["history"]
        if facts["scaler"]:
            self.scaler.load_state_dict(facts["scaler"])

    def loader(self) -> DataLoader:
        workers = self.settings.workers
        if workers < 0:
            workers = 0 if self.device.torch.type == "cpu" else min(8, os.cpu_count() or 1)
        return DataLoader(self.crops, batch_sampler=self.sampler, collate_fn=as_is, num_workers=workers,
                          pin_memory=self.device.torch.type == "cuda", persistent_workers=workers > 0)

    def epoch(self, epoch: int, loader: DataLoader) -> float:
        """Trains for one epoch and returns the mean loss. Every draw follows from (seed, epoch, step)."""
        settings, steps = self.settings, len(self.sampler)
        self.sampler.epoch = epoch
        torch.manual_seed(int(np.random.SeedSequence((settings.seed, epoch)).generate_state(1)[0]))  # drop-path
        self.model.train()
        total = 0.0
        with progress(loader, what=f"fold {self.fold}, epoch {epoch + 1}/{settings.epochs}", unit="batch") as bar:
            for step, batch in enumerate(bar):
                rate = learning_rate_at(epoch * steps + step, settings, steps)
                for group in self.optimiser.param_groups:
                    group["lr"] = rate
                batch = {name: tensor.to(self.device.torch, non_blocking=True) for name, tensor in batch.items()}
                log_mel = to_log_mel(batch["crop"], self.cache.config)
                rng = np.random.default_rng((settings.seed, epoch, step, 1))
                log_mel, target, weight = mix(log_mel, batch["target"] * (1 - settings.label_smoothing), batch["weight"], settings.augment, rng)
                if epoch == 0 and step == 0:
                    self.draw_batch(log_mel, target)
                with self.device.autocast():
                    loss = multi_label_loss(self.model(log_mel), target, weight, settings.loss)
                self.scaler.scale(loss).backward()
                value = loss.item()
                if not math.isfinite(value):
                    self.stop(value, epoch, step, batch["row"])
                self.scaler.unscale_(self.optimiser)
                if settings.clip_gradient:
                    nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_gradient)
                self.scaler.step(self.optimiser)
                self.scaler.update()
                self.optimiser.zero_grad(set_to_none=True)
                if self.ema:
                    self.ema.update(self.model, step=epoch * steps + step + 1)
                total += value
                bar.set_postfix(loss=f"{total / (step + 1):.4f}", crops_per_s=f"{(step + 1) * self.sampler.batch_size / bar.format_dict['elapsed']:.0f}"
                                if bar.format_dict["elapsed"] else "", refresh=False)
        return total / steps

    def stop(self, value: float, epoch: int, step: int, rows: Tensor) -> None:
        names = ", ".join(sorted(set(self.training.filename.iloc[rows.cpu().numpy()])))
        raise Diverged(f"the loss is {value} at epoch {epoch + 1}, step {step + 1}; nothing of this epoch is saved. Lower --learning-rate "
                       f"or set --precision fp32, and look at the batch's recordings: {names}")

    def validate(self) -> dict[str, float]:
        """Loss, top-1 and macro AP over the first window of each held-out recording: a curve to look at, nothing is selected on it."""
        if self.held_out.empty:
            return {"valid_loss": float("nan"), "valid_top1": float("nan"), "valid_macro_ap": float("nan")}
        probability = predict(self.kept, self.held_out.filename.tolist(), self.cache, self.device,
                              batch_size=self.settings.batch_size, only_first=True)
        target, weight = targets(self.held_out, self.classes, self.settings.secondary_labels, self.settings.secondary_weight)
        clipped = probability.clip(1e-7, 1 - 1e-7)
        loss = -(target * np.log(clipped) + (1 - target) * np.log(1 - clipped)) * weight
        return {"valid_loss": float(loss.mean()), "valid_top1": float(metrics.top1(target, probability).mean()),
                "valid_macro_ap": float(np.nanmean(metrics.per_class(target, probability)[0]))}

    def draw_batch(self, log_mel: Tensor, target: Tensor) -> None:
        titles = []
        for row in target.cpu().numpy()[:16]:
            titles.append(" + ".join(f"{self.classes[c]} {row[c]:.2f}" for c in np.argsort(-row)[:3] if row[c] > 0))
        plots.spectrogram_grid(self.folder / "first_batch.png", list(log_mel[:16, 0].cpu().numpy()), titles, self.cache.config,
                               f"{self.settings.run.name}, fold {self.fold}: the first batch as the network sees it")

    def finish(self) -> None:
        """Out-of-fold predictions, golden windows, and the weights last: where they lie, the fold is done."""
        names = self.held_out.filename.tolist()
        if names:
            probability = predict(self.kept, names, self.cache, self.device, batch_size=self.settings.batch_size)
            oof = pd.DataFrame(probability, columns=list(self.classes))
            oof.insert(0, "filename", names)
        else:
            oof = pd.DataFrame(columns=["filename", *self.classes])
        with atomic(self.folder / "oof.csv") as partial:
            oof.to_csv(partial, index=False, float_format="%.9g", lineterminator="\n")
        windows = HeldOutWindows((names or self.training.filename.tolist())[:GOLDEN_WINDOWS], self.cache, only_first=True)
        golden = torch.stack([windows[item][0] for item in range(len(windows))])
        save_tensors(self.folder / "golden_windows.safetensors", {"windows": golden}, {})
        save_tensors(self.folder / "weights.safetensors", self.kept.state_dict(), {"model": self.settings.model})
        self.checkpoint.unlink(missing_ok=True)

    def run(self) -> None:
        """Trains the epochs that are missing, saving after each; then finishes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        if self.checkpoint.exists():
            self.resume()
            say(f"fold {self.fold}: continuing after epoch {len(self.history)}")
        loader = self.loader() if len(self.history) < self.settings.epochs else None
        for epoch in range(len(self.history), self.settings.epochs):
            began = time.perf_counter()
            loss = self.epoch(epoch, loader)
            seconds = time.perf_counter() - began
            row = {"epoch": epoch + 1, "learning_rate": self.optimiser.param_groups[0]["lr"], "train_loss": loss, **self.validate()}
            self.history.append(row)
            self.save()
            self.write_history()
            say(f"fold {self.fold}, epoch {epoch + 1:3d}: loss {loss:.4f}, held out: loss {row['valid_loss']:.4f}, top-1 {row['valid_top1']:.3f}, "
                f"macro AP {row['valid_macro_ap']:.3f}; {len(self.sampler) * self.sampler.batch_size / seconds:.0f} crops/s")
        self.write_history()
        self.finish()

    def write_history(self) -> None:
        history = pd.DataFrame(self.history)
        with atomic(self.folder / "history.csv") as partial:
            history.to_csv(partial, index=False, float_format="%.9g", lineterminator="\n")
        if len(history) % 5 == 0 or len(history) == self.settings.epochs:
            plots.curves(self.folder / "curves.png", history, f"{self.settings.run.name}, fold {self.fold}")


def train_fold(settings: TrainSettings, fold: int, metadata: Metadata, folds: dict[str, int], cache: Cache) -> None:
    folder = settings.run / f"fold{fold}"
    with owned(folder):
        if settings.restart:
            for name in ("weights.safetensors", "checkpoint.safetensors", "model.onnx", "model.onnx.sha256", "oof.csv", "config.yaml"):
                (folder / name).unlink(missing_ok=True)
        training = FoldTraining(settings, fold, metadata, folds, cache)
        if training.held_out.empty:
            raise UserError(f"{settings.folds} holds out no cached recording in fold {fold}")
        if (folder / "config.yaml").exists():
            changed = differences(comparable(read_config(folder)), comparable(training.config))
            if changed:
                raise UserError(f"{folder} was trained with other settings ({'; '.join(changed)}); name another --run, or begin anew with --restart")
        if (folder / "weights.safetensors").exists():
            say(f"fold {fold}: {folder} is finished, nothing to do")
            return
        parameters = sum(p.numel() for p in training.model.parameters())
        say(f"fold {fold}: {len(training.training)} recordings in training, {len(training.held_out)} held out, {len(training.classes)} classes; "
            f"{settings.model} with {parameters / 1e6:.2f} M parameters on {training.device.torch} "
            f"({str(training.device.amp or torch.float32).removeprefix('torch.')}, {torch.get_num_threads()} CPU threads)")
        training.run()
        say(f"fold {fold}: wrote {folder}")


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(TrainSettings, argv, prog="python -m src.train", description=__doc__)
    keep_freed_memory()
    torch.set_num_threads(settings.threads or os.cpu_count() or 1)
    metadata, folds, cache = read_metadata(settings.data, settings.metadata), read_folds(settings.folds), Cache(settings.cache)
    names = metadata.table.filename[~metadata.table.is_extra]
    if not names.isin(list(folds)).all():
        missing = names[~names.isin(list(folds))]
        raise UserError(f"{settings.folds} lacks {len(missing)} recordings of the metadata, {missing.iloc[0]} for one; make it again with src.folds")
    uncached = [name for name in metadata.table.filename if name not in cache and name not in cache.damaged]
    if uncached:
        raise UserError(f"{settings.cache} lacks {len(uncached)} recordings of the metadata, {uncached[0]} for one; "
                        "run src.cache with the same --data and --metadata")
    damaged = metadata.table.filename.isin(list(cache.damaged)).sum()
    known = sorted({fold for fold in folds.values() if fold >= 0})
    wanted = known if settings.fold == ("all",) else settings.fold
    if not all(str(fold) in map(str, known) for fold in wanted):
        raise UserError(f"--fold {' '.join(map(str, wanted))}: {settings.folds} holds the folds {', '.join(map(str, known))}")
    say(f"{len(metadata.table)} recordings, {damaged} of them damaged and left out; cache {settings.cache}, folds {settings.folds}")
    for fold in wanted:
        train_fold(settings, int(fold), metadata, folds, cache)


if __name__ == "__main__":
    sys.exit(main())
