"""Crops a second of the training loader on one thread, beside librosa on the same recordings in the same run.

    python -m benchmarks.loader_speed [--data DATA --noise DIR] [--metadata FILE] [--cache CACHE]

The loader is the one that src.train uses, with its SpecAugment: from the cache alone, and with a quarter of the crops as waveforms mixed with
background noise, these from decoded recordings in memory (where they fit) or from the files. Librosa decodes at the file's own rate and
augments nothing: a random 5 s (offset, duration: its fastest), or the whole recording to cut 5 s from (the usual dataset class). Without
--data it makes the demo's recordings. Writes loader_speed.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from benchmarks.machine import about
from src.augment import AugmentSettings
from src.cache import Cache, build
from src.config import AudioConfig
from src.console import UserError, progress, say, stage
from src.dataset import BalancedSampler, Crops, as_is, sampling_share
from src.demo_data import make
from src.metadata import read_metadata, targets
from src.settings import parse
from src.storage import write_text


@dataclass(frozen=True)
class LoaderSettings:
    data: tuple[Path, ...] = ()
    metadata: Path | None = None
    cache: Path | None = None
    """A finished cache of the data; by default made in a temporary folder."""
    noise: Path | None = None
    """Background noise; needed with --data."""
    rounds: int = 5
    """All take turns; the medians over the rounds count."""
    crops: int = 1024
    """A round, from the cache; a quarter as many with waveforms, a sixteenth with librosa."""
    batch_size: int = 32
    results: Path = Path("benchmarks/results")


def random_stretch(path: str, config: AudioConfig, rng: np.random.Generator) -> np.ndarray:
    """(n,) a random window of the recording, decoded from there on."""
    spare = max(0.0, librosa.get_duration(path=path) - config.window_seconds)
    return librosa.load(path, sr=None, offset=rng.uniform(0, spare), duration=config.window_seconds)[0]


def cut_stretch(path: str, config: AudioConfig, rng: np.random.Generator) -> np.ndarray:
    """(n,) a random window of the recording, decoded whole."""
    sound, n = librosa.load(path, sr=None)[0], round(config.window_seconds * config.sample_rate)
    start = rng.integers(max(1, len(sound) - n))
    return sound[start : start + n]


def librosa_log_mel(sound: np.ndarray, config: AudioConfig) -> np.ndarray:
    power = librosa.feature.melspectrogram(y=sound, sr=config.sample_rate, n_fft=config.n_fft, hop_length=config.hop_length, win_length=config.win_length,
                                           window="hamming", pad_mode="constant", n_mels=config.n_mels, fmin=config.fmin, fmax=config.fmax)
    return librosa.power_to_db(power, top_db=None)


def per_second(work: Callable[[], object], n: int) -> float:
    """Items a second of this process's CPU time: what else the machine does plays no part."""
    began = time.process_time()
    work()
    return n / (time.process_time() - began)


def loader(table: pd.DataFrame, cache: Cache, settings: LoaderSettings, noise: Path, **augment: float) -> DataLoader:
    """As in src.train: its crops, its sampler, no worker processes."""
    classes = tuple(sorted(set(table.primary_label)))
    crops = Crops(table, cache, *targets(table, classes), settings=AugmentSettings(**augment), noise=noise, seed=0)
    sampler = BalancedSampler(sampling_share(table, power=0.5, use_rating=False), settings.batch_size, 0)
    sampler.epochs = range(10**9)
    return DataLoader(crops, batch_sampler=sampler, collate_fn=as_is, num_workers=0)


def measure(table: pd.DataFrame, cache: Cache, noise: Path, settings: LoaderSettings) -> dict[str, float]:
    """Crops a second: librosa in both ways, its decoding of 5 s alone, the loader from the cache, the loader with a quarter of waveforms in
    both ways; and `once`, the seconds in which all recordings are decoded into memory, as a training's first epochs do."""
    config, rng = cache.config, np.random.default_rng(0)
    loaders = {"cache": loader(table, cache, settings, noise, waveform_probability=0.0),
               "memory": loader(table, cache, settings, noise, waveform_probability=0.25),
               "files": loader(table, cache, settings, noise, waveform_probability=0.25, waveform_memory=0.0)}
    began, waveforms = time.process_time(), loaders["memory"].dataset.waveforms
    if waveforms.samples is None:
        raise UserError("these recordings do not fit into memory, which is to be measured too; give fewer, by another --metadata")
    for row in range(len(table)):
        waveforms.read(row, 0, 1)
    once = time.process_time() - began
    streams = {name: iter(batches) for name, batches in loaders.items()}
    n_batches = {name: max(1, settings.crops // settings.batch_size // (1 if name == "cache" else 4)) for name in streams}
    speeds: dict[str, list[float]] = {name: [] for name in ("librosa", "whole", "decoding", *streams)}
    for round_ in progress(range(settings.rounds + 1), what="measuring", unit="round"):
        paths = table.path.iloc[rng.integers(len(table), size=max(8, settings.crops // 16))].tolist()
        sounds = [random_stretch(path, config, rng) for path in paths]
        decoding = per_second(lambda: [random_stretch(path, config, rng) for path in paths], len(paths))  # noqa: B023
        whole = per_second(lambda: [cut_stretch(path, config, rng) for path in paths], len(paths))  # noqa: B023
        log_mel = per_second(lambda: [librosa_log_mel(sound, config) for sound in sounds], len(sounds))  # noqa: B023
        result = {"librosa": 1 / (1 / decoding + 1 / log_mel), "whole": 1 / (1 / whole + 1 / log_mel), "decoding": decoding}
        for name, stream in streams.items():
            result[name] = per_second(lambda: [next(stream) for _ in range(n_batches[name])], n_batches[name] * settings.batch_size)  # noqa: B023
        if round_:  # the first one warms up: imports, compiled resamplers, files
            for name, value in result.items():
                speeds[name].append(value)
    return {"once": once} | {name: float(np.median(values)) for name, values in speeds.items()}


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(LoaderSettings, argv, prog="python -m benchmarks.loader_speed", description=__doc__)
    if settings.data and settings.noise is None:
        raise UserError("--data needs --noise: a folder of background noise")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if not settings.data:
            make(root / "demo")
        data, noise = settings.data or (root / "demo",), settings.noise or root / "demo" / "noise"
        table = read_metadata(data, settings.metadata).table
        cache = Cache(settings.cache) if settings.cache else build(table, root / "cache", AudioConfig(), workers=1)
        table = table[table.filename.isin(cache.names)].reset_index(drop=True)
        say(f"{len(table)} recordings, one thread, {settings.rounds} rounds")
        speed = measure(table, cache, noise, settings)
        seconds = sum(map(cache.n_frames, cache.names)) / cache.config.frames_per_second
    rows = {"librosa": "librosa: load(offset, duration), melspectrogram, power_to_db", "decoding": "of that, load(offset, duration) alone",
            "whole": "librosa: load, cut, melspectrogram, power_to_db", "cache": "loader, from the cache, SpecAugment on half",
            "memory": "loader, a quarter as waveforms with background noise, recordings decoded in memory",
            "files": "loader, a quarter as waveforms with background noise, each read from its file"}
    words = " ".join(word for flag, value in (("data", settings.data and settings.data[0].name), ("noise", settings.noise and settings.noise.name)) if value
                     for word in (f"--{flag}", str(value)))
    text = "\n".join([
        "# Loader speed", "", about(f"python -m benchmarks.loader_speed {words} --rounds {settings.rounds}"), "",
        f"{len(table)} recordings of {seconds / len(table):.0f} s on average. Crops of {cache.config.window_seconds:g} s a second of one process's CPU time, "
        f"medians of {settings.rounds} rounds in turn. Decoding all recordings into memory takes {speed['once']:.1f} s, once: not counted.", "",
        "| | crops a second | times load(offset, duration) | times load of the whole |", "|---|---|---|---|",
        *(f"| {title} | {speed[name]:,.0f} | {speed[name] / speed['librosa']:.1f} | {speed[name] / speed['whole']:.1f} |"
          for name, title in rows.items()), ""])
    write_text(settings.results / "loader_speed.md", text)
    say(text)


if __name__ == "__main__":
    sys.exit(main())
