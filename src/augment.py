"""Augmentation: waveforms (audiomentations), SpecAugment (albumentations' XYMasking), mixup on the batch."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import audio
from .console import UserError, say

LN10 = math.log(10)
SILENT = 1e-4  # RMS under which a stretch is silence: never amplified to reach a signal-to-noise ratio


@dataclass(frozen=True)
class AugmentSettings:
    crop_choices: int = 1
    """So many random crops are looked at and the loudest is taken; 1: any."""
    waveform_probability: float = 0.25
    """Share of the crops that are read as waveforms and augmented there: the paper's background noise (0.25)."""
    waveform_memory: float = 2.0
    """GiB of each process for decoded recordings, where all of them fit; else each waveform is read from its file. At another rate than the recipe's the two
    resample with other neighbours: a crop's cells may differ by one step of the cache's scale."""
    min_snr_db: float = 0.0
    """Background noise, where --noise is given: the lowest signal-to-noise ratio."""
    max_snr_db: float = 20.0
    gain_db: float = 6.0
    """Gain is drawn from -gain_db to gain_db on the waveform path; 0: off."""
    band_filter_probability: float = 0.0
    """A low-pass or high-pass filter on the waveform path."""
    gaussian_probability: float = 0.0
    """White noise at 10 to 40 dB on the waveform path."""
    pitch_probability: float = 0.0
    """A shift by up to one semitone on the waveform path (25 ms a crop)."""
    roll_probability: float = 1.0
    """Share of the crops that are rotated in time by a random number of frames."""
    filter_db: float = 6.0
    """A random smooth frequency response within -filter_db to filter_db on each crop; 0: off."""
    stretch: float = 0.2
    """A crop lasts up to 1 + stretch times as long, or as short, before it is brought to the window's length; 0: off."""
    mel_shift_bins: int = 4
    """The spectrogram is moved up or down by at most so many mel bins (above 1 kHz two of 128 are a semitone); 0: off."""
    spec_augment_probability: float = 0.5
    """Share of the crops that are masked."""
    frequency_masks: int = 2
    """Most masks on a crop; their number is drawn from 0 on."""
    frequency_mask_bins: int = 16
    """Longest mask, of 128 mel bins."""
    time_masks: int = 2
    """Most masks on a crop; their number is drawn from 0 on."""
    time_mask_frames: int = 50
    """Longest mask: 50 frames = 0.5 s."""
    mixup_probability: float = 0.0
    """Share of the crops that are mixed with another of the batch."""
    mixup_alpha: float = 0.4
    """The mixing weight is drawn from Beta(alpha, alpha)."""
    mixup_target: Literal["linear", "union"] = "union"
    """The target of a mixed crop: both species present (union), or each in proportion to its weight (linear: the paper's)."""


class WaveformAugment:
    """A seeded audiomentations chain over one waveform. Holds the decoded noise; not thread-safe (use processes)."""

    def __init__(self, settings: AugmentSettings, noise: Path | None, sample_rate: int) -> None:
        import audiomentations as A

        self.made_from, self.sample_rate = (settings, noise, sample_rate), sample_rate
        chain: list = []
        if noise is not None:
            chain.append(_background_noise(noise, settings, sample_rate))
        if settings.gain_db:
            chain.append(A.Gain(min_gain_db=-settings.gain_db, max_gain_db=settings.gain_db, p=1.0))
        if settings.band_filter_probability:
            chain.append(A.OneOf([A.LowPassFilter(min_cutoff_freq=4000, max_cutoff_freq=12_000, p=1.0),
                                  A.HighPassFilter(min_cutoff_freq=200, max_cutoff_freq=1500, p=1.0)],
                                 p=settings.band_filter_probability))
        if settings.gaussian_probability:
            chain.append(A.AddGaussianSNR(min_snr_db=10, max_snr_db=40, p=settings.gaussian_probability))
        if settings.pitch_probability:
            chain.append(A.PitchShift(min_semitones=-1, max_semitones=1, p=settings.pitch_probability))
        self.chain = A.Compose(chain)

    def __reduce__(self) -> tuple:  # a spawned worker makes its own
        return WaveformAugment, self.made_from

    def __call__(self, waveform: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(n,) -> (n,) float32. The draws come from `rng` alone; Python's and numpy's global generators are restored."""
        states = random.getstate(), np.random.get_state()
        random.seed(int(rng.integers(2**32)))
        np.random.seed(int(rng.integers(2**32)))
        try:
            return self.chain(samples=waveform, sample_rate=self.sample_rate)
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def read_noise(folder: Path, sample_rate: int) -> dict[str, np.ndarray]:
    """path -> waveform of every audio file under `folder`; damaged ones are left out. Raises UserError if none is left."""
    sounds = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in audio.SUFFIXES):
        try:
            sounds[str(path)] = audio.read_waveform(path, sample_rate)
        except audio.DamagedAudio:
            continue
    if not sounds:
        raise UserError(f"--noise {folder}: no readable audio files below it")
    return sounds


def tell_heard(noise: Path, held_out: Collection[str]) -> None:
    """Says where noise is named like held-out recordings: public noise is often cut from the very clips that are to be recognised."""
    names = {path.stem for path in noise.rglob("*") if path.suffix.lower() in audio.SUFFIXES}
    heard = sorted(stem for stem in (PurePosixPath(name).stem for name in held_out) if stem in names)
    if heard:
        say(f"--noise {noise}: {len(heard)} of its files are named like recordings that are held out here, {heard[0]} for one; where they are the "
            "same sounds, the scores are too good")


def _background_noise(noise: Path, settings: AugmentSettings, sample_rate: int):
    """AddBackgroundNoise on decoded noise, which also copes with silence (audiomentations opens a file for each call)."""
    from audiomentations import AddBackgroundNoise
    from audiomentations.core.utils import calculate_desired_noise_rms, calculate_rms

    class BackgroundNoise(AddBackgroundNoise):
        def __init__(self, sounds: dict[str, np.ndarray]) -> None:
            super().__init__(list(sounds), settings.min_snr_db, settings.max_snr_db, p=1.0)
            self.sound_file_paths = list(sounds)  # in sorted order, whatever the file system's
            self.sounds = list(sounds.values())
            self.time_info_arr = np.array([len(sound) / sample_rate for sound in self.sounds], np.float32)

        def apply(self, samples: np.ndarray, sample_rate: int) -> np.ndarray:
            file = self.sound_file_paths.index(self.parameters["noise_file_path"])
            start = round(self.parameters["offset"] * sample_rate)
            for sound in self.sounds[file:] + self.sounds[:file]:  # a silent stretch: the next file's
                first = min(start, max(0, len(sound) - len(samples)))
                stretch = sound[first : first + len(samples)]
                if len(stretch) < len(samples):
                    stretch = np.resize(stretch, len(samples))
                noise_rms = calculate_rms(stretch)
                if noise_rms >= SILENT:
                    break
            else:
                return samples
            signal_rms = calculate_rms(samples)
            if signal_rms < SILENT:  # no signal to be relative to: the noise at its own level
                return samples + stretch
            wanted = calculate_desired_noise_rms(signal_rms, self.parameters["snr_db"])
            return samples + stretch * np.float32(wanted / noise_rms)

    return BackgroundNoise(read_noise(noise, sample_rate))


def roll(crop: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """(frames, n_mels) -> the same frames, beginning at a random one."""
    return np.roll(crop, int(rng.integers(len(crop))), axis=0) if rng.random() < probability else crop


def mel_shift(crop: np.ndarray, largest: int, rng: np.random.Generator) -> np.ndarray:
    """(frames, n_mels) -> the same, moved along the mel axis by at most `largest` bins; the outermost bin fills what falls free."""
    shift = int(rng.integers(-largest, largest + 1))
    bins = (np.arange(crop.shape[1]) - shift).clip(0, crop.shape[1] - 1)
    return crop.take(bins, axis=1)


def random_filter(crop: np.ndarray, largest: float, rng: np.random.Generator) -> np.ndarray:
    """(frames, n_mels) uint8 -> the same through another microphone: a gain in steps of the cache's scale, linear between
    two to five mel bins (FilterAugment, Nam et al. 2022). Digital silence (0) stays silent."""
    knots = np.sort(rng.uniform(0, crop.shape[1], int(rng.integers(2, 6))))
    gain = np.rint(np.interp(np.arange(crop.shape[1]), knots, rng.uniform(-largest, largest, len(knots)))).astype(np.int16)
    return (crop + gain).clip(0, 255).astype(np.uint8) * (crop > 0)


class SpecAugment:
    """SpecAugment (Park et al. 2019): masks over frequency and time, filled with the crop's mean (0 dB would be loud)."""

    def __init__(self, settings: AugmentSettings, frames: int, n_mels: int) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for its newest version
        import albumentations

        self.probability = settings.spec_augment_probability
        self.masking = albumentations.XYMasking(  # x: mel bins, y: frames, since crops are time-major
            num_masks_x=(0, settings.frequency_masks), mask_x_length=(0, min(settings.frequency_mask_bins, n_mels)),
            num_masks_y=(0, settings.time_masks), mask_y_length=(0, min(settings.time_mask_frames, frames)), fill=0, p=1.0)

    def __call__(self, crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(frames, n_mels) uint8 -> the same, masked with probability `spec_augment_probability`; draws from `rng` alone."""
        if rng.random() >= self.probability:
            return crop
        self.masking.set_random_seed(int(rng.integers(2**31)))
        self.masking.fill = round(crop.sum(dtype=np.uint32) / crop.size)  # a third of crop.mean()'s time
        return self.masking(image=crop)["image"]


def draw_mixup(n: int, settings: AugmentSettings, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(partner (n,) int, weight (n,) float32 of the crop itself): a crop that is not mixed has weight 1 (Zhang et al. 2018)."""
    partner = rng.permutation(n)
    weight = rng.beta(settings.mixup_alpha, settings.mixup_alpha, n) if settings.mixup_alpha > 0 else np.ones(n)
    mixed = rng.random(n) < settings.mixup_probability
    return partner, np.where(mixed, np.maximum(weight, 1 - weight), 1.0).astype(np.float32)


def mix(log_mel: Tensor, target: Tensor, weight: Tensor, settings: AugmentSettings, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Mixup within the batch. Powers are added, as in the air (a mean of decibels would fade both songs); the targets
    are united or mixed in proportion; a class masked in either crop stays masked."""
    if not settings.mixup_probability:
        return log_mel, target, weight
    partner, share = (torch.from_numpy(draw).to(log_mel.device, non_blocking=True) for draw in draw_mixup(len(log_mel), settings, rng))
    rows, image = share[:, None], share[:, None, None, None]
    bels = log_mel / 10
    other = torch.log10(1 - image + 1e-10) + bels[partner]
    mixed = torch.where(image < 1, 10 * (torch.logaddexp(LN10 * (torch.log10(image) + bels), LN10 * other) / LN10), log_mel)
    united = torch.maximum(target, target[partner]) if settings.mixup_target == "union" else rows * target + (1 - rows) * target[partner]
    return mixed, torch.where(rows < 1, united, target), torch.where(rows < 1, weight * weight[partner], weight)
