"""One fold in training: its data, model, optimiser and history; epochs, checkpoints and what it leaves."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import torch
import yaml
from torch import Tensor
from torch.utils.data import DataLoader

from . import metrics, plots
from .augment import mix, tell_heard
from .cache import Cache
from .checkpoint import load_tensors, optimiser_tensors, restore_optimiser, save_tensors
from .console import UserError, progress, say
from .cuda_graphs import replayed
from .dataset import BalancedSampler, Crops, HeldOutWindows, as_is, nested_share, sampling_share, to_log_mel
from .devices import Later, device_name, loader_workers
from .initialise import initialise
from .losses import multi_label_loss
from .metadata import Metadata, targets
from .models import create_model
from .optimiser import learning_rate_at, moving_average, optimiser_for
from .predict import predict
from .run_config import read_config, versions
from .settings import flatten
from .soft_labels import blend, read_soft_labels
from .storage import sha256, write_json, write_table, write_text
from .train_settings import TrainSettings
from .weight_noise import WeightNoise

GOLDEN_WINDOWS = 16  # held-out windows kept beside the weights: the export is checked on them
NOT_VALIDATED = {"valid_loss": math.nan, "valid_top1": math.nan, "valid_macro_ap": math.nan}
SECONDS_BETWEEN_CURVES = 20.0  # drawing them takes a third of one


def digest_of(table: pd.DataFrame) -> str:
    """Names a set of recordings and their labels, in whatever order."""
    rows = sorted(zip(table.filename, table.primary_label, table.secondary_labels))
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:10]


class FoldTraining:
    """Everything one fold needs, and its state. Every process of a training holds one; the first one writes."""

    def __init__(self, settings: TrainSettings, fold: int, metadata: Metadata, folds: dict[str, int], cache: Cache, accelerator) -> None:
        self.settings, self.fold, self.cache, self.accelerator = settings, fold, cache, accelerator
        self.folder, self.classes = settings.run / f"fold{fold}", metadata.classes
        table = metadata.table[metadata.table.filename.isin(cache.names)].reset_index(drop=True)
        of = np.where(table.is_extra, -1, table.filename.map(folds).fillna(-2)).astype(int)
        self.training, self.held_out = table[(of != fold) & (of != -2)].reset_index(drop=True), table[of == fold].reset_index(drop=True)
        soft = read_soft_labels(settings.soft_labels, metadata, folds) if settings.soft_labels else None
        known = self.training.primary_label.ne("") | self.training.filename.isin([] if soft is None else soft.index)
        self.training = self.training[known].reset_index(drop=True)
        n_crops = len(self.training)
        if not n_crops:
            raise UserError(f"{settings.folds} leaves no cached, labelled recording to train fold {fold} on")
        self.training = nested_share(self.training, settings.train_share, settings.seed)
        target, weight = targets(self.training, self.classes, settings.secondary_labels, settings.secondary_weight)
        self.prior = target[self.training.primary_label != ""].mean(axis=0).clip(1e-6, 1 - 1e-6)
        if soft is not None:
            target, weight = blend(self.training, target, weight, soft, settings.soft_weight)
        self.crops = Crops(self.training, cache, target, weight, settings=settings.augment, noise=settings.noise, seed=settings.seed)
        if settings.noise:
            tell_heard(settings.noise, self.held_out.filename)
        share = sampling_share(self.training, power=settings.sampling_power, use_rating=settings.use_rating)
        self.sampler = BalancedSampler(share, settings.batch_size, settings.seed, n_crops=n_crops, accumulate=settings.accumulate,
                                       process=accelerator.process_index, processes=accelerator.num_processes)
        torch.manual_seed(settings.seed)
        self.model = create_model(settings.model, len(self.classes), cache.config, settings.network)
        begun = initialise(self.model, settings, fold=fold, classes=self.classes, audio=cache.config,
                           held_out=self.held_out.filename) if settings.init else None
        self.model.to(accelerator.device, memory_format=torch.channels_last)
        self.weight_noise = WeightNoise(self.model, settings.weight_noise)
        self.ema = moving_average(self.model, settings.ema_decay)
        self.kept = self.ema.module if self.ema else self.model  # what is scored, and kept in the end
        self.network, self.optimiser = accelerator.prepare(self.model, optimiser_for(self.model, settings))
        self.compute = torch.compile(self.network) if settings.compile else self.network
        self.history: list[dict] = []
        self.seconds: list[float] = []  # of each epoch's training, on the processes' devices
        self.saved = time.perf_counter()
        self.drawn = time.monotonic()  # when the curves were
        self.config = {"settings": flatten(replace(settings, restart=False)) | {"fold": [str(fold)]}, "audio": cache.config.to_dict(),
                       "classes": list(self.classes), "soft_labels_sha256": sha256(settings.soft_labels) if settings.soft_labels else None,
                       "init": begun,
                       "prior": [float(f"{p:.6g}") for p in self.prior],
                       "recordings": {"training": len(self.training), "training_digest": digest_of(self.training),
                                      "held_out": len(self.held_out), "held_out_digest": digest_of(self.held_out)},
                       "processes": accelerator.num_processes, "precision": "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision,
                       "device": device_name(accelerator.device), "versions": versions()}

    # ------------------------------------------------------------------------------------------- state on disk

    def save(self) -> None:
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()} | optimiser_tensors(self.optimiser.optimizer)
        if self.ema:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.ema.module.state_dict().items()}
        scaler = self.accelerator.scaler
        save_tensors(self.folder / "checkpoint.safetensors", tensors,
                     {"history": self.history, "seconds": self.seconds, "scaler": scaler.state_dict() if scaler else {}})
        self.saved = time.perf_counter()

    def resume(self) -> None:
        tensors, facts = load_tensors(self.folder / "checkpoint.safetensors")
        for prefix, module in {"model.": self.model, **({"ema.": self.ema.module} if self.ema else {})}.items():
            module.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)})
        restore_optimiser(self.optimiser.optimizer, tensors)
        self.history, self.seconds = facts["history"], facts.get("seconds", [])
        if facts["scaler"] and self.accelerator.scaler:  # one that began in fp16 may go on in another precision
            self.accelerator.scaler.load_state_dict(facts["scaler"])

    def keep_origin(self) -> None:
        """Keeps in config.yaml what trained the earlier epochs, where it is not what trains now: other versions, another number of processes,
        another device or its precision."""
        before, origin = read_config(self.folder), ("processes", "precision", "device", "versions")
        earlier = [*before.get("earlier", []), {name: before.get(name) for name in origin}]
        if earlier := [one for one in earlier if one != {name: self.config[name] for name in origin}]:
            self.config["earlier"] = earlier

    def write_history(self, *, finished: bool = False) -> None:
        history = pd.DataFrame(self.history)
        write_table(self.folder / "history.csv", history, float_format="%.9g")
        if self.settings.pictures and (finished or time.monotonic() - self.drawn > SECONDS_BETWEEN_CURVES):
            self.drawn = time.monotonic()
            plots.curves(self.folder / "curves.png", history, f"{self.settings.run.name}, fold {self.fold}", self.settings.loss)

    # ------------------------------------------------------------------------------------------------ training

    def run(self) -> None:
        """Trains the epochs that are missing, saving after each (or every `checkpoint_seconds`); then finishes."""
        main, begun = self.accelerator.is_main_process, (self.folder / "checkpoint.safetensors").exists()
        if main:
            if begun and (self.folder / "config.yaml").exists():
                self.keep_origin()
            write_text(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        if begun:
            self.resume()
            say(f"fold {self.fold}: continuing after epoch {len(self.history)}")
        self.accelerator.wait_for_everyone()  # nobody saves before all have read
        epochs = range(len(self.history), self.settings.epochs)
        if epochs:
            self.record()  # before the loader's threads, which would disturb it
        batches = iter(self.loader(epochs)) if epochs else iter(())
        for epoch in epochs:
            began = time.perf_counter()
            loss = self.epoch(epoch, batches)
            seconds = time.perf_counter() - began
            self.require_finite(epoch)
            row = {"epoch": epoch + 1, "learning_rate": self.optimiser.param_groups[0]["lr"], "train_loss": loss, **NOT_VALIDATED}
            if (epoch + 1) % self.settings.validate_every == 0 or epoch + 1 == self.settings.epochs:
                row |= self.validate()
            self.history.append(row)
            self.seconds.append(seconds)
            if main:
                if time.perf_counter() - self.saved >= self.settings.checkpoint_seconds:
                    self.save()
                self.write_history()
            say(f"fold {self.fold}, epoch {epoch + 1:3d}: loss {loss:.4f}, held out: loss {row['valid_loss']:.4f}, top-1 {row['valid_top1']:.3f}, "
                f"macro AP {row['valid_macro_ap']:.3f}; {self.sampler.n_batches * self.sampler.batch_size / seconds:.1f} crops/s")
        self.finish()

    def loader(self, epochs: range) -> DataLoader:
        """The batches of all these epochs: the loader's processes work ahead while an epoch is validated and saved."""
        self.sampler.epochs = epochs
        on_gpu = self.accelerator.device.type == "cuda"
        workers = loader_workers(self.settings.workers, on_gpu=on_gpu, processes=self.accelerator.num_processes)
        return DataLoader(self.crops, batch_sampler=self.sampler, collate_fn=as_is, num_workers=workers, pin_memory=on_gpu)

    def record(self) -> None:
        """On one GPU: the network's passes as CUDA graphs, unless they are compiled or the flag says no. Not under --accumulate: a recorded
        backward pass leaves its gradients in the same memory every time, where the next part would overwrite what it should be added to."""
        settings, accelerator, config = self.settings, self.accelerator, self.cache.config
        alone = accelerator.device.type == "cuda" and accelerator.num_processes == 1 and settings.accumulate == 1
        if settings.cuda_graphs and not settings.compile and alone:
            replayed(self.network, torch.zeros(self.sampler.batch_size, 1, config.n_mels, config.window_frames, device=accelerator.device))

    def epoch(self, epoch: int, batches: Iterator[dict[str, Tensor] | UserError]) -> float:
        """Trains on the next epoch's batches and returns the mean loss. Every draw follows from (seed, epoch, part, process)."""
        accelerator, n_parts = self.accelerator, self.sampler.parts_per_epoch
        torch.manual_seed(int(np.random.SeedSequence((self.settings.seed, epoch, accelerator.process_index)).generate_state(1)[0]))  # drop-path, noise
        self.network.train()
        total, before = 0.0, None
        with progress(islice(batches, n_parts), total=n_parts, what=f"fold {self.fold}, epoch {epoch + 1}/{self.settings.epochs}", unit="batch") as bar:
            for part, batch in enumerate(bar):
                if isinstance(batch, UserError):
                    raise batch
                loss = self.learn(batch, epoch, part)
                # The value is read one part late: a GPU works on this part while the process waits for the one before.
                total += self.value_of(before)
                before = (Later(loss), epoch, part // self.settings.accumulate, batch["row"])
                crops = (part + 1) * len(batch["row"]) * accelerator.num_processes
                bar.set_postfix(loss=f"{total / max(1, part):.4f}", crops_per_s=f"{crops / max(1e-9, bar.format_dict['elapsed']):.0f}", refresh=False)
        total += self.value_of(before)
        return float(accelerator.reduce(torch.tensor(total, device=accelerator.device), "mean")) / n_parts

    def learn(self, batch: dict[str, Tensor], epoch: int, part: int) -> Tensor:
        """Forward and backward pass over a part, with the optimiser's step behind a batch's last one; the loss, on the device.
        Nothing here waits for a GPU."""
        settings, accelerator = self.settings, self.accelerator
        crop, target, weight = (batch[name].to(accelerator.device, non_blocking=True) for name in ("crop", "target", "weight"))
        rng = np.random.default_rng((settings.seed, epoch, part, 1 + accelerator.process_index))
        log_mel, target, weight = mix(to_log_mel(crop, self.cache.config), target * (1 - settings.label_smoothing), weight, settings.augment, rng)
        if epoch == part == 0 and accelerator.is_main_process and settings.pictures:
            self.draw_batch(log_mel, target)
        self.weight_noise.add()
        with accelerator.accumulate(self.network):
            loss = multi_label_loss(self.compute(log_mel), target, weight, settings.loss)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                self.update(epoch * self.sampler.n_batches + part // settings.accumulate)
        return loss

    def update(self, step: int) -> None:
        """One step of the optimiser, and of the moving average."""
        self.weight_noise.remove()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate_at(step, self.settings, self.sampler.n_batches)
        if self.settings.clip_gradient:
            self.accelerator.clip_grad_norm_(self.network.parameters(), self.settings.clip_gradient)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.ema:
            self.ema.update(self.model, step=step + 1)

    def value_of(self, pending: tuple[Later, int, int, Tensor] | None) -> float:
        """A part's loss as a number. Raises UserError, with the part's recordings, where it is none."""
        if pending is None:
            return 0.0
        loss, epoch, step, rows = pending
        value = loss.value()
        if not math.isfinite(value):
            names = ", ".join(sorted(set(self.training.filename.iloc[rows.numpy()])))
            others = " (of several processes' messages the lowest step's counts)" if self.accelerator.num_processes > 1 else ""
            raise UserError(f"the loss is {value} at epoch {epoch + 1}, step {step + 1}{others}; nothing of this epoch is saved. Lower --learning-rate "
                            f"or set --precision fp32, and look at the batch's recordings: {names}")
        return value

    def require_finite(self, epoch: int) -> None:
        """Raises UserError where an update has left weights that are no numbers, before they reach a checkpoint."""
        if not torch.nn.utils.get_total_norm(self.model.parameters()).isfinite():
            raise UserError(f"the weights are no finite numbers after epoch {epoch + 1}; nothing of this epoch is saved. Lower --learning-rate "
                            "or set --precision fp32")

    # -------------------------------------------------------------------------------------- held-out recordings

    def predict(self, names: list[str], *, only_first: bool = False) -> np.ndarray:
        """(n, C) the kept weights' probabilities, the work shared by the processes."""
        from accelerate.utils import broadcast, gather_object

        share = names[self.accelerator.process_index :: self.accelerator.num_processes]
        for buffer in self.kept.buffers():  # the first process's running means, for all
            buffer.copy_(broadcast(buffer))
        found = predict(self.kept, share, self.cache, self.accelerator, batch_size=self.sampler.batch_size // self.sampler.parts, only_first=only_first)
        by_name = dict(gather_object(list(zip(share, found))))
        return np.array([by_name[name] for name in names]).reshape(len(names), len(self.classes))

    def validate(self) -> dict[str, float]:
        """Loss, top-1 and macro AP over the first window of each held-out recording: a curve to look at, nothing is selected on it."""
        probability = self.predict(self.held_out.filename.tolist(), only_first=True)
        target, weight = targets(self.held_out, self.classes, self.settings.secondary_labels, self.settings.secondary_weight)
        clipped = probability.clip(1e-7, 1 - 1e-7)
        loss = -(target * np.log(clipped) + (1 - target) * np.log(1 - clipped)) * weight
        truth = (target > 0).astype(np.float32)  # as src.evaluate has it, also where secondary labels are soft
        return {"valid_loss": float(loss.mean()), "valid_top1": float(metrics.top1(truth, probability).mean()),
                "valid_macro_ap": float(np.nanmean(metrics.per_class(truth, probability)[0]))}

    def draw_batch(self, log_mel: Tensor, target: Tensor) -> None:
        titles = []
        for row in target.cpu().numpy()[:16]:
            titles.append(" + ".join(f"{self.classes[c]} {row[c]:.2f}" for c in np.argsort(-row)[:3] if row[c] > 0))
        plots.spectrogram_grid(self.folder / "first_batch.png", list(log_mel[:16, 0].cpu().numpy()), titles, self.cache.config,
                               f"{self.settings.run.name}, fold {self.fold}: the first batch as the network sees it")

    def finish(self) -> None:
        """Out-of-fold predictions, golden windows, and the weights last: where they lie, the fold is done."""
        names = self.held_out.filename.tolist()
        oof = pd.DataFrame(self.predict(names), columns=list(self.classes))
        oof.insert(0, "filename", names)
        if not self.accelerator.is_main_process:
            return
        self.write_history(finished=True)
        write_table(self.folder / "oof.csv", oof, float_format="%.9g")
        windows = HeldOutWindows(names[:GOLDEN_WINDOWS], self.cache, only_first=True)
        golden = torch.stack([windows[item][0] for item in range(len(windows))])
        write_json(self.folder / "timing.json", {"device": device_name(self.accelerator.device), "seconds": self.seconds})
        save_tensors(self.folder / "golden_windows.safetensors", {"windows": golden}, {})
        save_tensors(self.folder / "weights.safetensors", self.kept.state_dict(), {"model": self.settings.model})
        (self.folder / "checkpoint.safetensors").unlink(missing_ok=True)
