"""Speed of the cache: hours of audio built per core-second, and crops read warm, beside librosa in the same run.

    python -m benchmarks.cache_speed [--data DATA]

Without --data it makes 1.2 hours of Ogg Vorbis. Writes benchmarks/results/cache_speed.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import pandas as pd

from benchmarks.machine import about
from src import audio
from src.cache import build
from src.config import AudioConfig
from src.console import say, stage
from src.demo_data import SPECIES, noise, sing, write_audio
from src.metadata import read_metadata
from src.settings import parse
from src.storage import write_text

BARS = {"build, x real time a core": 1000.0, "warm crop read, ms": 0.05}


@dataclass(frozen=True)
class SpeedSettings:
    data: tuple[Path, ...] = ()
    recordings: int = 140
    """Made recordings of 30 s, where no --data is given."""


def made(root: Path, n: int) -> pd.DataFrame:
    rng, names = np.random.default_rng(0), [f"{number}.ogg" for number in range(n)]
    for name in names:
        sound = noise(30, "rain", rng) * 0.02
        for start in range(0, 28, 3):
            sing(sound, SPECIES[rng.integers(len(SPECIES))], start, 0.3, rng)
        write_audio(root / name, sound)
    return pd.DataFrame({"filename": names, "path": [str(root / name) for name in names]})


def with_librosa(path: str, config: AudioConfig) -> np.ndarray:
    sound, _ = librosa.load(path, sr=None)
    return librosa.power_to_db(librosa.feature.melspectrogram(
        y=sound, sr=config.sample_rate, n_fft=config.n_fft, hop_length=config.hop_length, win_length=config.win_length, window="hamming",
        n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax))


@stage
def main(argv: list[str] | None = None) -> int:
    settings, config = parse(SpeedSettings, argv, prog="python -m benchmarks.cache_speed", description=__doc__), AudioConfig()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        table = read_metadata(settings.data).table if settings.data else made(root / "audio", settings.recordings)
        seconds = sum(audio.read_header(path).seconds for path in table.path)
        audio.log_mel(np.zeros(config.sample_rate, np.float32), config)  # librosa's import and the filterbank
        began = time.process_time()  # of this process: one worker builds in it
        cache = build(table, root / "cache", config, workers=1)
        build_speed = seconds / (time.process_time() - began)
        with_librosa(table.path[0], config)
        sample, began = table.path[:20], time.process_time()
        for path in sample:
            with_librosa(path, config)
        librosa_speed = sum(audio.read_header(path).seconds for path in sample) / (time.process_time() - began)
        rng, times = np.random.default_rng(0), []
        for name in cache.names:
            cache.read(name)  # warm
        for _ in range(5000):
            name = cache.names[rng.integers(len(cache.names))]
            start = int(rng.integers(max(1, cache.n_frames(name) - config.window_frames)))
            before = time.perf_counter()
            cache.read(name, start, config.window_frames)
            times.append((time.perf_counter() - before) * 1e3)
    median = float(np.median(times))
    rows = [f"| decode + log-mel + write, x real time a core | {build_speed:,.0f} | at least {BARS['build, x real time a core']:,.0f} |",
            f"| librosa.load + melspectrogram, not written | {librosa_speed:,.0f} | ours is {build_speed / librosa_speed:.1f} times as fast |",
            f"| 5-second crop read warm, median (95th percentile), ms | {median:.4f} ({np.percentile(times, 95):.4f}) | at most {BARS['warm crop read, ms']} |"]
    text = "\n".join(["# Cache speed", "", about("python -m benchmarks.cache_speed" + (f" --data {settings.data[0].name}" if settings.data else "")),
                      "", f"{seconds / 3600:.2f} h in {len(table)} files; CPU time of one process.", "", "| | measured | target |", "|---|---|---|", *rows, ""])
    write_text(Path("benchmarks/results/cache_speed.md"), text)
    say(text)
    return int(build_speed < BARS["build, x real time a core"] or median > BARS["warm crop read, ms"])


if __name__ == "__main__":
    sys.exit(main())
