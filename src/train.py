"""STAGE 3: metadata + folds + cache -> runs/<run>/fold<k>/: weights, config, history, curves, out-of-fold predictions."""

from __future__ import annotations

import math
import os
import sys
from contextlib import nullcontext
from dataclasses import replace

import torch

from . import devices
from .cache import Cache, cache_folder
from .config import differences
from .console import UserError, resumable, say
from .fold_training import FoldTraining
from .folds import fold_table, read_folds
from .metadata import Metadata, read_metadata
from .run_config import comparable, read_config
from .settings import parse
from .storage import owned, sha256
from .train_settings import TrainSettings

RESULTS = ("weights.safetensors", "checkpoint.safetensors", "model.onnx", "model.onnx.sha256", "oof.csv", "config.yaml")


def train_fold(settings: TrainSettings, fold: int, metadata: Metadata, folds: dict[str, int], cache: Cache, accelerator) -> None:
    """Trains one fold to its end, or says that it is done. Raises UserError where its folder is taken or holds other settings."""
    folder, main = settings.run / f"fold{fold}", accelerator.is_main_process
    with owned(folder) if main else nullcontext():
        training = FoldTraining(settings, fold, metadata, folds, cache, accelerator)  # raises before --restart deletes anything
        if training.held_out.empty:
            raise UserError(f"{settings.folds} holds out no cached recording in fold {fold}")
        if settings.restart and main:
            for name in RESULTS:
                (folder / name).unlink(missing_ok=True)
        accelerator.wait_for_everyone()
        # Only the first process writes. Another that saw no checkpoint, in a folder of its own node, would begin anew beside it.
        files = ("config.yaml", "checkpoint.safetensors", "weights.safetensors")
        on_disk = {name: sha256(folder / name) if (folder / name).exists() else "not there" for name in files}
        devices.require_same(accelerator, on_disk | comparable(training.config) | {"precision": training.config["precision"]})
        if (folder / "config.yaml").exists():
            changed = differences(comparable(read_config(folder)), comparable(training.config))
            if changed:
                raise UserError(f"{folder} was trained with other settings ({'; '.join(changed)}); name another --run, or begin anew with --restart")
        if (folder / "weights.safetensors").exists():
            say(f"fold {fold}: {folder} is finished, nothing to do")
            return
        accelerator.wait_for_everyone()  # all have looked before the first one writes
        parameters = sum(p.numel() for p in training.model.parameters())
        say(f"fold {fold}: {len(training.training)} recordings in training, {len(training.held_out)} held out, {len(training.classes)} classes; "
            f"{settings.model} with {parameters / 1e6:.2f} M parameters on {accelerator.num_processes} x {accelerator.device.type} "
            f"({'fp32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision}, {torch.get_num_threads()} CPU threads)")
        if training.sampler.batch_size != settings.batch_size:
            say(f"fold {fold}: batches of {training.sampler.batch_size}, since there are not {settings.batch_size} recordings")
        try:
            training.run()
        except torch.OutOfMemoryError as error:
            raise UserError(f"the memory of {accelerator.device} does not hold a part of {training.sampler.batch_size // training.sampler.parts} crops; "
                            f"--accumulate {2 * settings.accumulate} halves it, --batch-size, --input-side and --model make it smaller too (with --restart, "
                            "since other settings are another training)") from error
        accelerator.wait_for_everyone()
        say(f"fold {fold}: wrote {folder}")


def located(settings: TrainSettings) -> TrainSettings:
    """The settings with the fold table and the cache that belong to the data, where none is named."""
    established = settings.data[0] / "folds.csv"  # src.prepare's
    folds = settings.folds or (established if established.exists() else fold_table(settings.data[0]))
    return replace(settings, folds=folds, cache=settings.cache or cache_folder(settings.data[0]))


def require_sensible(settings: TrainSettings) -> None:
    """Raises UserError for a number that no training can have meant."""
    values = vars(settings) | vars(settings.augment) | vars(settings.network)
    for names, fits, words in ((("batch_size", "accumulate", "epochs", "validate_every", "crop_choices"), lambda value: value >= 1, "at least 1"),
                               (("train_share",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
                               (("label_smoothing", "ema_decay", "drop_path"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
                               (("learning_rate", "warmup_epochs", "weight_decay", "clip_gradient", "weight_noise", "seed", "threads", "gain_db", "filter_db",
                                 "stretch", "mel_shift_bins", "mixup_alpha", "frequency_masks", "frequency_mask_bins", "time_masks", "time_mask_frames"),
                                lambda value: 0 <= value < math.inf, "a number not below 0"),
                               (("soft_weight", "secondary_weight", *(name for name in values if name.endswith("_probability"))),
                                lambda value: 0 <= value <= 1, "between 0 and 1"),
                               (("seed",), lambda value: value < 2**63, "below 2^63"), (("sampling_power",), math.isfinite, "a finite number")):
        for name in names:
            if not fits(values[name]):
                raise UserError(f"--{name.replace('_', '-')} {values[name]}: it is {words}")
    if not -math.inf < settings.augment.min_snr_db <= settings.augment.max_snr_db < math.inf:
        raise UserError(f"--min-snr-db {settings.augment.min_snr_db:g}, --max-snr-db {settings.augment.max_snr_db:g}: both are finite numbers, "
                        "the first not above the second")


def say_unused(settings: TrainSettings) -> None:
    """Names the settings that were given and that nothing in this training reads."""
    if settings.noise and not settings.augment.waveform_probability:
        say(f"--noise {settings.noise} is not used: noise is mixed in on the waveform path, and --waveform-probability is 0")
    usual, given = vars(TrainSettings().network.asca), vars(settings.network.asca)
    if not settings.model.startswith("asca_") and (others := [name for name in given if given[name] != usual[name]]):
        say(f"{', '.join('--' + name.replace('_', '-') for name in others)}: not used, since {settings.model} is not ASCA")
    if settings.network.drop_path and settings.model.startswith("panns_"):
        say(f"--drop-path {settings.network.drop_path:g} is not used: {settings.model} has no stochastic depth")


@resumable
def main(argv: list[str] | None = None) -> None:
    settings = located(parse(TrainSettings, argv, prog="python -m src.train", description=__doc__, of_data="train.yaml"))
    require_sensible(settings)
    say_unused(settings)
    devices.keep_freed_memory()
    accelerator = devices.start(device=settings.device, precision=settings.precision, accumulate=settings.accumulate, threads=settings.threads)
    if settings.batch_size % (settings.accumulate * accelerator.num_processes):
        raise UserError(f"--batch-size {settings.batch_size} cannot be shared by {accelerator.num_processes} process(es) in "
                        f"{settings.accumulate} part(s); make it a multiple of {settings.accumulate * accelerator.num_processes}")
    metadata, folds, cache = read_metadata(settings.data, settings.metadata), read_folds(settings.folds), Cache(settings.cache)
    names = metadata.table.filename[~metadata.table.is_extra]
    if not names.isin(list(folds)).all():
        missing = names[~names.isin(list(folds))]
        raise UserError(f"{settings.folds} lacks {len(missing)} recordings of the metadata, {missing.iloc[0]} for one; make it again with src.folds")
    uncached = metadata.table[[name not in cache and name not in cache.damaged for name in metadata.table.filename]]
    gone = uncached.is_extra & ~uncached.path.map(os.path.exists).astype(bool)
    if not gone.all():
        raise UserError(f"{settings.cache} lacks {(~gone).sum()} recordings of the metadata, {uncached.filename[~gone].iloc[0]} for one; "
                        "run src.cache with the same --data and --metadata")
    if gone.any():  # copies are known by their duration, and so by their file
        say(f"{len(uncached)} recordings of further folders, {uncached.filename.iloc[0]} for one, are neither there nor in the cache, and are left out")
    damaged = metadata.table.filename.isin(list(cache.damaged)).sum()
    known = sorted({fold for fold in folds.values() if fold >= 0})
    wanted = known if settings.fold == ("all",) else settings.fold
    if not all(str(fold) in map(str, known) for fold in wanted):
        raise UserError(f"--fold {' '.join(map(str, wanted))}: {settings.folds} holds the folds {', '.join(map(str, known))}")
    say(f"{len(metadata.table)} recordings, {damaged} of them damaged and left out; cache {settings.cache}, folds {settings.folds}")
    for fold in wanted:
        train_fold(settings, int(fold), metadata, folds, cache, accelerator)
        devices.release(accelerator)
    accelerator.end_training()  # the processes' group, where there is one


if __name__ == "__main__":
    sys.exit(main())
