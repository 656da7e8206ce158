"""Metadata + folds + cache -> training crops (augmented, uint8) and the windows of held-out recordings."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from . import audio
from .audio import DamagedAudio
from .augment import AugmentSettings, SpecAugment, WaveformAugment, mel_shift, random_filter, roll
from .cache import Cache
from .config import AudioConfig
from .console import UserError
from .waveforms import Waveforms

SCORED_SECONDS = 60.0  # of a held-out recording

Key = tuple[int, int, int]  # epoch, place in the epoch, row of the table: all that an item's draws depend on


class Crops(Dataset):
    """Random windows of the training recordings. Fetches whole batches: DataLoader(collate_fn=as_is).

    A batch: crop (B, frames, n_mels) uint8; target and weight (B, n_classes) float32; row (B,) int64.
    """

    def __init__(self, table: pd.DataFrame, cache: Cache, target: np.ndarray, weight: np.ndarray, *,
                 settings: AugmentSettings, noise: Path | None, seed: int) -> None:
        self.names, self.paths = table.filename.tolist(), table.path.tolist()
        self.cache, self.target, self.weight = cache, target, weight
        self.settings, self.seed = settings, seed
        self.spec_augment = SpecAugment(settings, cache.config.window_frames, cache.config.n_mels)
        self.waveform_augment = None
        # A gain alone is no reason to decode: the window's normalisation undoes it.
        on_waveforms = noise is not None or settings.band_filter_probability or settings.gaussian_probability or settings.pitch_probability
        if settings.waveform_probability > 0 and on_waveforms:
            absent = [path for path in self.paths if not os.path.exists(path)]
            if absent:
                raise UserError(f"{absent[0]} is not there ({len(absent)} recording(s) in all), and a part of the crops is cut from the audio; "
                                "bring it back, or train from the cache alone with --waveform-probability 0")
            self.waveform_augment = WaveformAugment(settings, noise, cache.config.sample_rate)
            n_frames = np.array([cache.n_frames(name) for name in self.names])
            self.waveforms = Waveforms(self.paths, n_frames, cache.config, most_bytes=settings.waveform_memory * 2**30)

    def __len__(self) -> int:
        return len(self.names)

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Tensor] | UserError:
        """A batch; or what keeps it from being made, since an exception would leave a loader's process as a traceback."""
        rows = np.array([row for _, _, row in keys])
        try:
            crops = np.stack([self.crop(*key) for key in keys])
        except UserError as error:
            return error
        return {
            "crop": torch.from_numpy(crops),
            "target": torch.from_numpy(self.target[rows]),
            "weight": torch.from_numpy(self.weight[rows]),
            "row": torch.from_numpy(rows),
        }

    def crop(self, epoch: int, place: int, row: int) -> np.ndarray:
        """(window_frames, n_mels) uint8: the same for the same arguments, whatever the worker."""
        rng = np.random.default_rng((self.seed, epoch, place))
        name, n_window = self.names[row], self.cache.config.window_frames
        if self.settings.stretch:
            n_window = round(n_window * (1 + self.settings.stretch) ** rng.uniform(-1, 1))
        n_frames = self.cache.n_frames(name)
        starts = rng.integers(n_frames - n_window + 1 if n_frames >= n_window else n_frames, size=self.settings.crop_choices)
        start = int(starts[0] if len(starts) == 1 else max(starts, key=lambda at: self.cache.read(name, int(at), n_window).mean()))
        if self.waveform_augment is not None and rng.random() < self.settings.waveform_probability:
            crop = self.waveform_crop(row, start, n_window, rng)
        elif n_frames >= n_window:
            crop = self.cache.read(name, start, n_window)
        else:
            crop = wrap(self.cache.read(name), start, n_window)
        if self.settings.stretch:
            crop = cv2.resize(crop, (self.cache.config.n_mels, self.cache.config.window_frames), interpolation=cv2.INTER_LINEAR)
        if self.settings.mel_shift_bins:
            crop = mel_shift(crop, self.settings.mel_shift_bins, rng)
        if self.settings.roll_probability:
            crop = roll(crop, self.settings.roll_probability, rng)
        if self.settings.filter_db:
            crop = random_filter(crop, self.settings.filter_db / self.cache.config.db_step, rng)
        return self.spec_augment(crop, rng)

    def waveform_crop(self, row: int, start: int, n_window: int, rng: np.random.Generator) -> np.ndarray:
        """The same `n_window` frames from the audio file, augmented before the log-mel.

        The stretch is read with half an n_fft of context on both sides and padded where the recording ends, so
        that its frames are the cache's own.
        """
        config, n_frames = self.cache.config, self.cache.n_frames(self.names[row])
        first, n = (start, n_window) if n_frames >= n_window else (0, n_frames)
        left = first * config.hop_length - config.n_fft // 2
        right = left + (n - 1) * config.hop_length + config.n_fft
        try:
            stretch = self.waveforms.read(row, max(0, left), right)
        except DamagedAudio as error:
            raise UserError(f"{self.paths[row]} was readable when it was cached, and is not now: {error}; restore the file, or cache the data again") from error
        stretch = self.waveform_augment(stretch, rng)
        if len(stretch) < right - left:
            stretch = np.pad(stretch, (max(0, -left), right - max(0, left) - len(stretch)))
        crop = audio.to_uint8(audio.frames_to_log_mel(stretch, config), config).T
        return crop if n == n_window else wrap(crop, start, n_window)


def wrap(spectrogram: np.ndarray, start: int, n_frames: int) -> np.ndarray:
    """(frames, n_mels) -> (n_frames, n_mels): a short recording, repeated from frame `start` on."""
    return spectrogram[(start + np.arange(n_frames)) % len(spectrogram)]


class BalancedSampler(Sampler):
    """Parts of batches of keys; a recording is drawn with a probability in proportion to `share` (n,), with replacement.

    An epoch is as many crops as there are recordings, or `n_crops`, to the nearest full batch, and follows from (seed, epoch).
    Iterating goes through `epochs`, one after the other, so that loader processes work ahead into the next one. A batch is
    cut into `accumulate` parts for each process, so that any number of processes and parts trains on the same crops (where there are fewer
    recordings than a batch holds, it is cut to a multiple of the parts).
    """

    def __init__(self, share: np.ndarray, batch_size: int, seed: int, *, n_crops: int | None = None, accumulate: int = 1, process: int = 0,
                 processes: int = 1) -> None:
        n_crops = n_crops or len(share)
        self.share, self.seed, self.epochs = share / share.sum(), seed, range(1)
        self.parts, self.first, self.per_batch = processes * accumulate, process * accumulate, accumulate
        self.batch_size = max(1, min(batch_size, n_crops) // self.parts) * self.parts
        self.n_batches = max(1, round(n_crops / self.batch_size))

    @property
    def parts_per_epoch(self) -> int:
        return self.n_batches * self.per_batch

    def __len__(self) -> int:
        return len(self.epochs) * self.parts_per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch in self.epochs:
            yield from self._epoch(epoch)

    def _epoch(self, epoch: int) -> Iterator[list[Key]]:
        rng = np.random.default_rng((self.seed, epoch, 0, 0, 1))  # no crop's and no step's: their last numbers are others
        rows = rng.choice(len(self.share), self.n_batches * self.batch_size, p=self.share)
        keys = [(epoch, place, int(row)) for place, row in enumerate(rows)]
        for first in range(0, len(keys), self.batch_size):
            for part in range(self.first, self.first + self.per_batch):
                yield keys[first + part : first + self.batch_size : self.parts]


def sampling_share(table: pd.DataFrame, *, power: float, use_rating: bool) -> np.ndarray:
    """(n,) how often a recording is drawn: (class count / all)^-power, times rating / 5 where asked (0 = not rated: the mean).

    Recordings without a label are no species: each is drawn as often as a labelled one on average. Raises UserError for a power beyond all numbers.
    """
    counts = table.primary_label.map(table.primary_label.value_counts()).to_numpy()
    with np.errstate(over="ignore"):
        share, labelled = (counts / len(table)) ** -power, (table.primary_label != "").to_numpy()
    share[~labelled] = share[labelled].mean() if labelled.any() else 1.0
    if use_rating:
        rating = table.rating.where(table.rating > 0)
        share = share * (rating.fillna(rating.mean()).fillna(5.0) / 5.0).to_numpy()
    if not 0 < share.sum() < np.inf:
        raise UserError(f"--sampling-power {power:g} leaves no number to draw by; the field's values lie between 0 and 1")
    return share


def nested_share(table: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The rows of a stratified share: of each species the nearest number of recordings, at least one.

    A species' recordings stand in an order that (seed, filename) alone gives, and a share takes the first of them: a smaller share lies
    within a larger one, and a recording has the same place in every fold.
    """
    order = table.filename.map(lambda name: hashlib.sha256(f"{seed} {name}".encode()).hexdigest())
    species = order.groupby(table.primary_label)
    kept = species.rank(method="first") <= np.maximum(1, (share * species.transform("size")).round())
    return table[kept].reset_index(drop=True)


class HeldOutWindows(Dataset):
    """The consecutive windows of recordings' first minute (or only each one's first): (window uint8, place in the table).

    A recording's number of windows follows the rows of a soundscape: max(1, round(seconds / window_seconds)).
    The last one is padded with silence; a recording shorter than a window is repeated.
    """

    def __init__(self, names: Sequence[str], cache: Cache, *, only_first: bool = False) -> None:
        self.names, self.cache = list(names), cache
        config = cache.config
        self.places = []
        for place, name in enumerate(self.names):
            seconds = min(SCORED_SECONDS, (cache.n_frames(name) - 1) / config.frames_per_second)  # a frame stands at either end
            n = 1 if only_first else max(1, round(seconds / config.window_seconds))
            self.places += [(place, number * config.window_frames) for number in range(n)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        place, start = self.places[item]
        n = self.cache.config.window_frames
        window = self.cache.read(self.names[place], start, n)
        if len(window) < n and start == 0:
            window = wrap(window, 0, n)
        window = np.pad(window, ((0, n - len(window)), (0, 0)))  # 0 is db_min: silence
        return torch.from_numpy(window.copy()), place


def as_is(batch: dict) -> dict:
    return batch


def to_log_mel(crops: Tensor, config: AudioConfig) -> Tensor:
    """(B, frames, n_mels) uint8 -> (B, 1, n_mels, frames) float32 dB, on the crops' device."""
    return (crops.transpose(1, 2).unsqueeze(1).float() * config.db_step + config.db_min).contiguous()
