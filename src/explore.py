"""What a data set in BirdCLEF's layout holds: its table, and pictures of classes, durations, recordists, places and sounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from . import audio, folds, plots
from .config import AudioConfig
from .console import UserError
from .folds_audit import write_audit
from .metadata import read_csv, read_metadata, with_durations
from .settings import read_recipe


def read(data: Path, metadata: Path | None = None) -> pd.DataFrame:
    """metadata.read_metadata's table with latitude and longitude (degrees) and every duration_s (s) that can be had; NaN elsewhere.

    Durations come from the files' headers where the table lacks them and the audio is there.
    """
    file = metadata or data / "train_metadata.csv"
    table, raw = with_durations(read_metadata([data], metadata).table), read_csv(file)
    for column in ("latitude", "longitude"):
        table[column] = pd.to_numeric(raw[column], errors="coerce").to_numpy() if column in raw else np.nan
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """One column of figures, each a count of what the table says."""
    per_species = table.primary_label.value_counts()
    known = table.duration_s.notna()
    return pd.DataFrame({"": {
        "recordings": f"{len(table)}",
        "species": f"{len(per_species)}, of {per_species.min()} to {per_species.max()} recordings, median {per_species.median():g}",
        "species with under 5 recordings": f"{(per_species < 5).sum()}",
        "recordings with secondary labels": f"{table.secondary_labels.map(bool).sum()}",
        "recordists": f"{table.author[table.author != ''].nunique()}; {(table.author == '').sum()} recordings have none",
        "hours": f"{table.duration_s.sum() / 3600:.1f} in {known.sum()} recordings of known duration",
        "with a place": f"{table[['latitude', 'longitude']].notna().all(axis=1).sum()}",
        "with a rating": f"{(table.rating > 0).sum()}",
    }})


def draw_classes(path: Path, table: pd.DataFrame) -> Path:
    """Recordings of every species, frequent to rare."""
    counts = table.primary_label.value_counts()
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(counts)), counts, width=0.9 if len(counts) <= 60 else 1.0)  # hairlines between many would flicker
    if len(counts) <= 60:
        axes.set_xticks(range(len(counts)), counts.index, rotation=90, fontsize=8)
    axes.set(title=f"{len(counts)} species", ylabel="recordings", yscale="log", xlim=(-1, len(counts)), xlabel="" if len(counts) <= 60 else "frequent to rare")
    return _save(figure, path)


def draw_durations(path: Path, table: pd.DataFrame, window_seconds: float = AudioConfig.window_seconds) -> Path:
    """How long the recordings are, and what share of all the sound lies in the long ones."""
    seconds = np.sort(table.duration_s[table.duration_s > 0].to_numpy())
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    many, sound = figure.subplots(1, 2)
    if not len(seconds):
        return _save(_empty(figure, [many, sound], "no duration is known: neither the table nor the audio is there to say"), path)
    edges = np.geomspace(seconds[0] * 0.99, seconds[-1] * 1.01, 41)
    many.hist(seconds, edges)
    many.axvline(window_seconds, color="C3", label=f"{window_seconds:g} s, a window")
    many.set(title=f"{len(seconds)} durations", xlabel="seconds", ylabel="recordings", xscale="log")
    sound.plot(seconds, np.cumsum(seconds) / 3600)
    sound.set(title="hours in recordings of at most that length", xlabel="seconds", ylabel="hours", xscale="log", ylim=(0, None))
    many.legend()
    return _save(figure, path)


def draw_authors(path: Path, table: pd.DataFrame, n: int = 20) -> Path:
    """The most active recordists, and how many recordists make what share of the recordings."""
    counts = table.author[table.author != ""].value_counts()
    figure = Figure(figsize=(13, 4), layout="constrained")
    top, share = figure.subplots(1, 2)
    if counts.empty:
        return _save(_empty(figure, [top, share], "no recordist is named"), path)
    top.barh(range(len(counts[:n])), counts[:n])
    top.set_yticks(range(len(counts[:n])), [plots.plain(name, 30) for name in counts.index[:n]], fontsize=7)
    top.invert_yaxis()
    top.set(title=f"the {len(counts[:n])} most active of {len(counts)} recordists", xlabel="recordings")
    share.plot(np.arange(1, len(counts) + 1), counts.cumsum() / len(table))
    share.set(title="share of all recordings made by the most active", xlabel="recordists", xscale="log", ylim=(0, 1))
    return _save(figure, path)


def draw_places(path: Path, table: pd.DataFrame) -> Path:
    """Where the recordings were made: longitude and latitude over a graticule of 30 degrees, and the densest part of it."""
    places = table[table.longitude.between(-180, 180) & table.latitude.between(-90, 90)][["longitude", "latitude"]].to_numpy()
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    world, near = figure.subplots(1, 2, width_ratios=(2, 1))
    if not len(places):
        return _save(_empty(figure, [world, near], "no recording has a place"), path)
    size = np.clip(3000 / len(places), 5, 20)
    for axes in (world, near):
        axes.set_facecolor("0.97")
        axes.grid(color="0.75", linewidth=0.6)
        axes.scatter(*places.T, s=size, alpha=0.35, linewidths=0, rasterized=True)
        axes.set(xlabel="longitude, degrees", ylabel="latitude, degrees")
    world.set(xlim=(-180, 180), ylim=(-90, 90), xticks=range(-180, 181, 30), yticks=range(-90, 91, 30), aspect="equal",
              title=f"{len(places)} of {len(table)} recordings have a place")
    for level, name in ((0, "equator"), (23.44, "tropics"), (-23.44, "")):
        world.axhline(level, color="0.5", linewidth=0.8, linestyle="-" if level == 0 else ":")
        world.text(-178, level + 1, name, fontsize=7, color="0.4")
    counts, x, y = np.histogram2d(*places.T, bins=(np.arange(-180, 181, 10), np.arange(-90, 91, 10)))
    column, row = np.unravel_index(counts.argmax(), counts.shape)
    inside = (np.digitize(places[:, 0], x[1:-1]) == column) & (np.digitize(places[:, 1], y[1:-1]) == row)
    centre = np.median(places[inside], axis=0)
    near.set(xlim=centre[0] + np.array([-10, 10]), ylim=centre[1] + np.array([-10, 10]), aspect="equal", title="around the densest 10 degrees")
    return _save(figure, path)


def examples(table: pd.DataFrame, config: AudioConfig, n: int = 8, seed: int = 0) -> list[tuple[str, np.ndarray]]:
    """The first window of `n` recordings of different species, as (title, waveform); fewer where fewer are readable."""
    found: list[tuple[str, np.ndarray]] = []
    shuffled = table.sample(frac=1, random_state=seed).drop_duplicates("primary_label")
    for recording in shuffled.itertuples():
        if len(found) == n:
            break
        if not Path(recording.path).exists():
            continue
        try:
            waveform = audio.read_stretch(recording.path, 0, round(config.window_seconds * config.sample_rate), config)
        except audio.DamagedAudio:
            continue  # another one serves as well
        if len(waveform):
            found.append((f"{recording.primary_label}: {Path(recording.filename).name}", waveform))
    return found


def draw_examples(path: Path, found: list[tuple[str, np.ndarray]], config: AudioConfig) -> Path:
    log_mels = [audio.log_mel(waveform, config) for _, waveform in found]
    plots.spectrogram_grid(path, log_mels, [title for title, _ in found], config,
                           f"log-mel spectrograms: {config.window_seconds:g} s in which each recording begins")
    return path


def audio_config(data: Path) -> AudioConfig:
    """The recipe of the data set's cache.yaml, else the default: src.cache's without flags."""
    usual, recipe = AudioConfig().to_dict(), data / "cache.yaml"
    return AudioConfig(**usual | (read_recipe(recipe, usual) if recipe.exists() else {}))


def audit(data: Path, out: Path, *, n_folds: int, metadata: Path | None = None) -> tuple[str, Path]:
    """The folds' audit, its Markdown and its picture: of the data's own folds.csv where it has one, else the one in folds/, else of folds
    made in `out`."""
    table = folds.fold_table(data)
    if not metadata and (data / "folds.csv").exists():
        table, recordings, of = out / "folds.csv", with_durations(read_metadata([data]).table), folds.read_folds(data / "folds.csv")
        fold = recordings.filename.map(of).fillna(-1).astype(int).to_numpy()
        write_audit(recordings, {"established": fold}, chosen="established", n_folds=fold.max() + 1, out=table)
    elif metadata or not table.with_suffix(".audit.md").exists():
        table = out / "folds.csv"
        flags = ["--data", str(data), "--out", str(table), "--n-folds", str(n_folds), "--overwrite", *(["--metadata", str(metadata)] if metadata else [])]
        if folds.main(flags):
            raise UserError(f"no folds could be made of {data}; the reason stands above")
    text = table.with_suffix(".audit.md").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if not line.startswith("![")), table.with_suffix(".audit.png")


def _empty(figure: Figure, axes: list[Axes], why: str) -> Figure:
    for each in axes:
        each.set_axis_off()
    figure.suptitle(why)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    for each in figure.axes:
        for axis in (each.xaxis, each.yaxis):
            if axis.get_scale() == "log":  # 4, 6, 10 rather than powers of ten
                axis.set_major_formatter(LogFormatter())
                axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
    plots.save(figure, path, dpi=80)
    return path
