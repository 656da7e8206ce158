"""Background for composed soundscapes: made noise, or files that a run was not trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.composition import CROSSFADE, FRAME, Clip, over_rumble, power
from src import audio
from src.console import UserError
from src.demo_data import RATE, noise
from src.storage import sha256

MADE_SECONDS = 20.0
SILENT, FADED = 1e-4, 0.05  # RMS of a frame that is left out: in itself, and as a share of its file's


def made_clip(rng: np.random.Generator) -> np.ndarray:
    return noise(MADE_SECONDS, ("wind", "rain", "insects")[rng.integers(3)], rng)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in audio.SUFFIXES)


def without_silence(sound: np.ndarray) -> np.ndarray:
    """The frames that hold noise, one after the other: no event can be measured against silence."""
    level = np.sqrt(power(over_rumble(sound)))
    heard = level > max(SILENT, FADED * np.sqrt(np.square(level).mean()))
    return sound[: len(heard) * FRAME].reshape(-1, FRAME)[heard].reshape(-1)


def held_back_clips(folders: Sequence[Path], trained_with: Sequence[Path]) -> tuple[Clip, list[str], str]:
    """A drawer of files below `folders`, their SHA-256, and what they are in words.

    A file whose bytes lie in a folder that the run was trained with is left out, whatever its name. Raises UserError
    where that cannot be told, or nothing is left.
    """
    absent = [folder for folder in [*trained_with, *folders] if not folder.is_dir()]
    if absent:
        raise UserError(f"{absent[0]} is no folder, so what the run was trained with cannot be told from what is held back; put it back, "
                        "or leave out --noise for made noise" if absent[0] in trained_with else f"--noise {absent[0]} is no folder")
    heard = {sha256(path) for folder in trained_with for path in files_below(folder)}
    files = {sha256(path): path for folder in folders for path in files_below(folder)}
    sounds = []
    for digest in (kept := sorted(set(files) - heard)):
        try:
            sound = without_silence(audio.read_waveform(files[digest], RATE))
        except (audio.DamagedAudio, ValueError):
            continue
        if len(sound) >= 2 * CROSSFADE:
            sounds.append(sound)
    if not sounds:
        raise UserError(f"--noise: {len(files)} files, {len(files) - len(kept)} of them trained with, and no other holds a second of noise; "
                        "hold some back from the training, or leave out --noise for made noise")
    text = f"{len(sounds)} noise files ({len(files) - len(kept)} that the run was trained with are left out)"
    return lambda rng: sounds[rng.integers(len(sounds))], kept, text
