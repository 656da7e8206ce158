"""Stretches of recordings at the recipe's rate: from memory where all of them fit, else from the files by seeking."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np

from . import audio
from .audio import DamagedAudio
from .config import AudioConfig


class Waveforms:
    """Where all recordings fit into `most_bytes`, each is decoded once, by the process that needs it first, into memory that forked loader
    processes share. Vorbis takes half of a waveform crop's time; small data sets come by again every epoch."""

    def __init__(self, paths: Sequence[str], n_frames: np.ndarray, config: AudioConfig, *, most_bytes: float) -> None:
        self.paths, self.n_frames, self.config = paths, n_frames, config
        self.first = np.concatenate([[0], np.cumsum(n_frames * config.hop_length)])  # a recording of f frames has at most f hops' samples
        self.samples = None
        if 4 * self.first[-1] <= most_bytes:
            self.samples = np.frombuffer(mmap.mmap(-1, 4 * int(self.first[-1])), np.float32)
            self.lengths = np.frombuffer(mmap.mmap(-1, 8 * len(paths)), np.int64)  # 0: not decoded yet

    def __getstate__(self) -> dict:  # a spawned process reads from the files
        return {**self.__dict__, "samples": None, "lengths": None}

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) of a recording, float32 mono, fewer where it ends; not to be written to. Raises DamagedAudio."""
        if self.samples is None:
            return audio.read_stretch(self.paths[row], start, stop, self.config)
        room = self.samples[self.first[row] : self.first[row + 1]]
        if not self.lengths[row]:
            waveform = audio.read_waveform(self.paths[row], self.config.sample_rate)
            if 1 + len(waveform) // self.config.hop_length != self.n_frames[row]:
                raise DamagedAudio("its length is another one")
            room[: len(waveform)] = waveform
            self.lengths[row] = len(waveform)
        return room[start : min(stop, self.lengths[row])]
