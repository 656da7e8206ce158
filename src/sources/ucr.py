"""One data set of the UCR time-series archive (Dau et al. 2019), https://www.cs.ucr.edu/~eamonn/time_series_data_2018/ or
https://timeseriesclassification.com: univariate series -> one-second sounds. The paper names the archive and not how; this is ours."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from ..console import UserError, say
from ..storage import atomic_folder
from .layout import DataSet

RATE = 4000  # Hz of the sounds; a series fills one second
LOWEST, HIGHEST = 0.1, 0.9  # amplitude of a series' smallest and largest value

Row = tuple[str, np.ndarray]  # label, series (n,) float64 with NaN for missing values


def ucr(source: Path, out: Path) -> DataSet:
    """<Name>_TRAIN and <Name>_TEST, .tsv (2018's archive) or .ts (the UEA's). TEST is fold 0, TRAIN always in training.

    A series becomes a sound of 1 s (`to_waveform`). One of n points holds frequencies up to n / 2 Hz: at the default recipe's 32 kHz nearly
    all of the spectrogram would be empty. So the recipe is another one: 4 kHz, frames of 50 ms every 5 ms, mel bins up to n / 2 Hz of the
    longest series (at least 500 Hz, at most 2 kHz). There the lowest bins show the series' level over time and the ones above its
    oscillations. One without any value is counted as missing.
    """
    files = {part: the_file(source, part) for part in ("TRAIN", "TEST")}
    rows, sounds, labels = [], {}, {}
    for part, file in files.items():
        declared, series = (read_ts if file.suffix == ".ts" else read_tsv)(file)
        labels |= dict.fromkeys(declared)
        if not series:
            raise UserError(f"{file} holds no series; obtain it again")
        for number, (label, values) in enumerate(series, start=1):
            name = f"{file.stem}_{number:05d}.flac"
            rows.append({"primary_label": label, "secondary_labels": "[]", "filename": name, "fold": 0 if part == "TEST" else -1})
            sounds[name] = values
    write_sounds(sounds, out / "train_audio")
    recordings, longest = pd.DataFrame(rows), max(map(len, sounds.values()))
    if unheard := sorted(set(recordings.primary_label[recordings.fold == 0]) - set(recordings.primary_label[recordings.fold == -1])):
        say(f"mind that {files['TRAIN']} has no series of class {', '.join(unheard)}, which {files['TEST'].name} has")
    classes = list(labels) or sorted(recordings.primary_label.unique(), key=_numbers_first)
    return DataSet(
        recordings, folds={"folds.csv": recordings.fold}, classes={label: label for label in classes},
        cache={"sample_rate": RATE, "n_fft": 2048, "win_length": 200, "hop_length": 20, "fmin": 0.0, "fmax": float(np.clip(longest / 2, 500, RATE / 2)),
               "db_max": 50.0, "window_seconds": 1.0},  # + 50 dB: a level of 1, weighted by filters a few Hz wide, and 6 dB of gain in training
        train={"time_mask_frames": 20})  # a tenth of the window, as in the default recipe


def name_of(source: Path) -> str:
    """The archive holds many data sets: which one this is."""
    return f"ucr {the_file(source, 'TRAIN').stem.removesuffix('_TRAIN')}"


def the_file(source: Path, part: str) -> Path:
    found = next((files for suffix in ("tsv", "ts") if (files := sorted(source.glob(f"[!.]*_{part}.{suffix}")))), [])
    if len(found) != 1:
        raise UserError(f"{source} holds {len(found)} files named <Name>_{part}.tsv or .ts instead of one; name the folder of one of the archive's data sets")
    return found[0]


def to_waveform(series: np.ndarray, n: int) -> np.ndarray | None:
    """(points,) -> (n,) float32: from its first to its last value, linearly interpolated, also over missing ones; None where all are missing.

    Scaled so that its smallest value is 0.1 and its largest 0.9. It never clips, and stays positive: a frame's level in dB says the sign too.
    Each series is scaled by itself, as most of the archive is z-normalised; a constant one lies at 0.5.
    """
    known = np.flatnonzero(np.isfinite(series))
    if not len(known):
        return None
    waveform = np.interp(np.linspace(known[0], known[-1], n), known, series[known])
    low, high = waveform.min(), waveform.max()
    share = (waveform - low) / (high - low) if high > low else np.full(n, 0.5)
    return (LOWEST + (HIGHEST - LOWEST) * share).astype(np.float32)


def write_sounds(series: dict[str, np.ndarray], folder: Path) -> None:
    """Writes each as a 16-bit flac file; `folder` is replaced once all are written."""
    with atomic_folder(folder) as unfinished:
        for name, values in series.items():
            if (sound := to_waveform(values, RATE)) is not None:
                soundfile.write(flac := io.BytesIO(), sound, RATE, format="FLAC", subtype="PCM_16")
                (unfinished / name).write_bytes(flac.getvalue())


def read_tsv(file: Path) -> tuple[list[str], list[Row]]:
    """No declared labels, and the rows: a label, then the values, tab-separated; NaN is missing or, at the end, shorter than the longest."""
    return [], [_row(file, number, *line.split("\t")) for number, line in _lines(file)]


def read_ts(file: Path) -> tuple[list[str], list[Row]]:
    """The header's labels, and the rows: values separated by commas (? is missing), a colon, the label.

    Raises UserError for several channels, time stamps, or a file without class labels.
    """
    lines, header = _lines(file), {}
    for number, line in lines:
        if line.startswith("#"):
            continue
        key, *values = line.split()
        if key.lower() == "@data":
            break
        if not key.startswith("@"):
            raise UserError(f"{file}, line {number}: {line[:80]!r} stands before @data and is no @-line; it is no .ts file")
        header[key.lower()] = values
    said = {key: "".join(values[:1]).lower() for key, values in header.items()}
    if said.get("@univariate") == "false":
        raise UserError(f"{file}: its series have several channels; only univariate data sets become sounds; name another one")
    if said.get("@timestamps") == "true":
        raise UserError(f"{file}: its values have time stamps; only evenly spaced series become sounds; name another data set")
    if said.get("@classlabel") != "true":
        raise UserError(f"{file}: it has no class labels (@classLabel true ...); name a data set of classification")
    rows, declared = [], header["@classlabel"][1:]
    for number, line in lines:
        values, *rest = line.split(":")
        if len(rest) != 1:
            raise UserError(f"{file}, line {number}: {len(rest)} colons; a univariate series has one, before its label; correct the line or delete it")
        rows.append(_row(file, number, rest[0], *values.replace("?", "nan").split(",")))
        if rows[-1][0] not in declared:
            raise UserError(f"{file}, line {number}: label {rows[-1][0]!r} is not among @classLabel's; correct the line or delete it")
    return declared, rows


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines that are not empty."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            yield from ((number, line.rstrip()) for number, line in enumerate(lines, start=1) if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not readable: {error}; obtain it again") from error


def _row(file: Path, number: int, label: str, *values: str) -> Row:
    try:
        series = np.array(values, float)
    except ValueError as error:
        raise UserError(f"{file}, line {number}: {error}; correct the line or delete it") from error
    known = series[np.isfinite(series)]
    if len(known) and known.max() / 2 - known.min() / 2 > np.finfo(float).max / 2:
        raise UserError(f"{file}, line {number}: its values span more than a float64; correct the line or delete it")
    if not label.strip() or not len(series):
        raise UserError(f"{file}, line {number}: no label or no values; correct the line or delete it")
    return label.strip(), series


def _numbers_first(label: str) -> tuple:
    """1, 2, 10 rather than 1, 10, 2."""
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label
