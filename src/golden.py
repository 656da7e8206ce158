"""The golden example: a sound with its log-mel and its submission, computed where a bundle was built and again where it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from scipy.special import logit

from . import audio, infer, kaggle
from .console import UserError, say
from .onnx_models import find_models

SOUND, LOG_MEL, SUBMISSION = "sound.wav", "log_mel.npy", "submission.csv"
LOG_MEL_BOUND = 0.01  # dB; librosa in double precision comes to within 0.001
PROBABILITY_BOUND = 1e-4
LOSSY_BOUND = 0.1  # of any probability, in bf16 or int8: a processor that gets it wrong is further off
LOSSY_CORRELATION = 0.95  # of the logits, where small probabilities are all within the bound: zeros or other species' are not alike
VORBIS_CORRELATION = 0.9  # of the samples; at its usual quality 0.98 and more
TRIAL_SECONDS = 300.0


def compute(folder: Path, runs: Sequence[str]) -> tuple[np.ndarray, pd.DataFrame]:
    """The sound's log-mel (n_mels, frames) by the first model's recipe, and its rows of probabilities by src.infer."""
    recipe = find_models([Path(run) for run in runs], threads=1)[0].audio
    log_mel = audio.log_mel(audio.read_waveform(folder / SOUND, recipe.sample_rate), recipe)
    with tempfile.TemporaryDirectory() as out:
        rows = Path(out) / SUBMISSION
        if infer.main(["--run", *runs, "--soundscapes", str(folder), "--out", str(rows), "--threads", "1"]):
            raise UserError(f"{folder / SOUND} cannot be scored; the reason stands above")
        return log_mel, pd.read_csv(rows, index_col="row_id")


def check(folder: Path, runs: Sequence[str]) -> None:
    """Computes the example again, after a look at whether Ogg Vorbis decodes here, which soundscapes come in.

    Raises UserError where it does not, or this machine comes to other numbers than the bundle holds.
    """
    check_vorbis(folder / SOUND)
    log_mel, table = compute(folder, runs)
    expected_log_mel, expected = np.load(folder / LOG_MEL), pd.read_csv(folder / SUBMISSION, index_col="row_id")
    if log_mel.shape != expected_log_mel.shape or not (table.index.equals(expected.index) and table.columns.equals(expected.columns)):
        raise UserError(f"{folder}: the golden example has other rows, species or frames here than where the bundle was built; build the bundle again")
    decibels = float(np.abs(log_mel - expected_log_mel).max())
    probability = float(np.abs(table - expected).to_numpy().max())
    if not (decibels <= LOG_MEL_BOUND and probability <= PROBABILITY_BOUND):
        raise UserError(f"{folder}: the golden example comes out differently here: log-mel by {decibels:.2g} dB (bound {LOG_MEL_BOUND}), probabilities "
                        f"by {probability:.2g} (bound {PROBABILITY_BOUND}); compare the printed versions with requirements.txt")
    say(f"golden example: log-mel within {decibels:.1e} dB, probabilities within {probability:.1e} of where the bundle was built")


def check_vorbis(sound: Path) -> None:
    """Writes a sound as Ogg Vorbis and reads it back. Raises UserError where another sound or none comes back."""
    rate = audio.read_header(sound).sample_rate
    samples = audio.read_waveform(sound, rate)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sound.ogg"
        try:
            with soundfile.SoundFile(path, "w", rate, 1, format="OGG", subtype="VORBIS") as file:
                for start in range(0, len(samples), rate):  # libsndfile crashes on long Vorbis blocks
                    file.write(samples[start : start + rate])
            again = audio.read_waveform(path, rate)
        except (soundfile.LibsndfileError, audio.DamagedAudio) as error:
            raise UserError(f"soundfile {soundfile.__version__} here cannot read Ogg Vorbis, which soundscapes come in: {error}") from error
    if len(again) != len(samples) or np.corrcoef(samples, again)[0, 1] < VORBIS_CORRELATION:
        raise UserError(f"soundfile {soundfile.__version__} here reads another sound from Ogg Vorbis than was written")


def precision(folder: Path, runs: Sequence[str], wanted: str) -> str:
    """`wanted`, where this machine scores the example in it and comes to within LOSSY_BOUND of float32; else f32, after saying why."""
    if wanted == "f32":
        return wanted
    with tempfile.TemporaryDirectory() as out:
        rows = Path(out) / SUBMISSION
        fault = kaggle.aside("src.infer", "--run", *runs, "--soundscapes", str(folder), "--out", str(rows), "--threads", "1", "--precision", wanted,
                             seconds=TRIAL_SECONDS) or _distance(rows, folder / SUBMISSION)
    say(f"float32 instead of {wanted}: {fault}" if fault else f"{wanted}: the golden example comes to within {LOSSY_BOUND} of float32's probabilities")
    return "f32" if fault else wanted


def _distance(rows: Path, expected: Path) -> str:
    """What is wrong with rows of a lossy precision; empty where nothing is."""
    found, exact = (pd.read_csv(path, index_col="row_id") for path in (rows, expected))
    found = found.reindex(index=exact.index, columns=exact.columns).to_numpy()
    change = float(np.abs(found - exact.to_numpy()).max())
    if not change <= LOSSY_BOUND:
        return f"it changes the golden example's probabilities by {change:.2g} (bound {LOSSY_BOUND})"
    alike = float(np.corrcoef(*(logit(np.clip(table, 1e-6, 1 - 1e-6)).ravel() for table in (found, exact.to_numpy())))[0, 1])
    return "" if alike >= LOSSY_CORRELATION else f"the logits' correlation with the golden example's is {alike:.3f} (bound {LOSSY_CORRELATION})"
