"""Composed soundscapes, scored by the models that never heard their recordings: a stand-in for the leaderboard.

    python -m benchmarks.soundscapes --run RUN [--data DIR --metadata FILE] [--noise DIR ...]

For each fold of a trained run: songs cut from THAT fold's held-out recordings at known moments over background noise, scored by
that fold's own exported model. Says what the signal-to-noise ratio costs, and what overlapping windows, the way they are pooled and
smoothed rows are worth. Writes benchmarks/results/soundscapes.md and .png, and one timeline into the run's folder. What is scored is kept in
runs/<run>/soundscapes: an interrupted run continues.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import background_noise, composition, pooling
from benchmarks.background_noise import held_back_clips, made_clip
from benchmarks.composition import Clip, Composition, compose, deal
from benchmarks.machine import about
from benchmarks.pooling import window_starts
from benchmarks.soundscape_report import NAMES, SHOWN, Scored, draw, markdown, measure
from src import audio, evaluate, plots, submission
from src.console import UserError, progress, resumable, say, usable_cores
from src.demo_data import write_audio
from src.metadata import Metadata
from src.onnx_models import OnnxModel, find_models
from src.run_config import read_config
from src.settings import parse
from src.soundscapes import Soundscape, ahead, decode
from src.storage import atomic, owned, sha256, write_text

FEW = " From fewer than 20 soundscapes such intervals tend to be too narrow."


@dataclass(frozen=True)
class SoundscapeSettings:
    run: Path = Path("runs/asca")
    data: tuple[Path, ...] = ()
    """Where the recordings lie; by default where they lay when the run was trained."""
    metadata: Path | None = None
    noise: tuple[Path, ...] = ()
    """Folders of background noise that the run was not trained with; made noise (wind, rain, insects) where none is named."""
    per_fold: int = 4
    """Soundscapes of each fold; no recording is in two of them."""
    seconds: float = 600.0
    events: int = 30
    """Of each soundscape."""
    snr_db: tuple[float, ...] = (-5.0, 0.0, 5.0, 10.0, 20.0)
    """Each soundscape is scored at each of these ratios."""
    seed: int = 0
    resamples: int = 500
    """Of the bootstrap over soundscapes."""
    batch_size: int = 8
    threads: int = 0
    """Of the model; 0: all cores."""
    results: Path = Path("benchmarks/results")


@dataclass(frozen=True)
class Task:
    """One soundscape to be: whose recordings, over what, for which model."""

    fold: int
    number: int
    hand: pd.DataFrame
    clip: Clip
    model: OnnxModel
    made_of: str  # digest of all that its score depends on

    def compose(self, settings: SoundscapeSettings) -> Composition:
        rng = np.random.default_rng((settings.seed, self.fold, self.number))
        return compose(self.hand, self.clip, seconds=settings.seconds, n_events=settings.events, rng=rng)


def usable(names: pd.Series, metadata: Metadata) -> pd.DataFrame:
    """The fold's recordings of one species alone (where the others of a recording sing, nobody knows), each but once."""
    table = metadata.table.set_index("filename").loc[names].reset_index()
    alone = [not set(row.secondary_labels) - {row.primary_label} for row in table.itertuples()]
    return table[alone].drop_duplicates("copy_group").reset_index(drop=True)


def write_soundscapes(made: Composition, folder: Path, snr_db: tuple[float, ...]) -> list[Path]:
    """One Ogg Vorbis file for each ratio, as the competition's soundscapes are."""
    paths = [folder / f"snr_{snr:g}.ogg" for snr in snr_db]
    for path, snr in zip(paths, snr_db):
        write_audio(path, made.at(snr))
    return paths


def window_probabilities(model: OnnxModel, paths: list[Path], starts: np.ndarray, batch_size: int) -> np.ndarray:
    """(files, windows, C), by the decoding and the windows of src.infer. Raises UserError where a file does not decode."""
    soundscapes = [Soundscape(path, path.stem, 0.0, 0, 0) for path in paths]
    parts: list[list[np.ndarray]] = [[] for _ in paths]
    for number, config, windows in ahead(decode(soundscapes, lambda _: {model.audio: starts}, batch_size)):
        if config is not None:
            parts[number].append(model.probabilities(windows))
    damaged = [f"{soundscape.path}: {soundscape.fault}" for soundscape in soundscapes if soundscape.fault]
    if damaged:
        raise UserError(f"{damaged[0]}; a composed soundscape does not decode: is the disk full?")
    return np.stack([np.concatenate(part) for part in parts])


def score_soundscape(task: Task, settings: SoundscapeSettings, kept: Path) -> Scored:
    """Composes and scores one soundscape at every ratio, unless `kept` holds it already."""
    if kept.exists():
        with np.load(kept) as file:
            if str(file["made_of"]) == task.made_of:
                return Scored(file["windows"], file["truth"], int(file["events"]), file["unusable"].tolist())
    made, n = task.compose(settings), submission.n_rows(settings.seconds)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_soundscapes(made, Path(folder), settings.snr_db)
        windows = window_probabilities(task.model, paths, window_starts(n, task.model.audio.window_seconds), settings.batch_size)
    scored = Scored(windows, made.truth(task.model.classes, n), len(made.events), sorted(made.unusable))
    with atomic(kept) as partial, open(partial, "wb") as file:
        np.savez(file, windows=windows, truth=scored.truth, events=scored.events, unusable=np.array(scored.unusable, str), made_of=task.made_of)
    return scored


def draw_example(task: Task, scored: Scored, settings: SoundscapeSettings, folder: Path) -> None:
    """example.ogg and example.png: one soundscape at the middle one of the ratios, with its truth."""
    middle, config = len(settings.snr_db) // 2, task.model.audio
    write_audio(folder / "example.ogg", task.compose(settings).at(settings.snr_db[middle]))
    n_frames = round(len(scored.truth) * submission.ROW_SECONDS * config.frames_per_second)
    log_mel = audio.log_mel(audio.read_waveform(folder / "example.ogg", config.sample_rate), config)[:, :n_frames]
    plots.timeline(folder / "example.png", log_mel, scored.rows(config.window_seconds)[middle], task.model.classes, config,
                   row_seconds=submission.ROW_SECONDS, truth=scored.truth,
                   heading=f"{settings.run.name}, fold {task.fold}: composed soundscape, every song at {settings.snr_db[middle]:g} dB")


def digest_of(settings: SoundscapeSettings, model: OnnxModel, hand: pd.DataFrame, noise: list[str]) -> str:
    facts = [settings.seconds, settings.events, settings.snr_db, settings.seed, sha256(model.path), hand.filename.tolist(), hand.path.tolist(),
             hand.primary_label.tolist(), [Path(path).stat().st_size for path in hand.path], noise,
             [sha256(module.__file__) for module in (composition, background_noise, pooling)]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def plan(settings: SoundscapeSettings, threads: int) -> tuple[list[Task], str]:
    """What is to be scored, and the background in words. Each fold's recordings go to its own model alone."""
    by_fold, metadata, _ = evaluate.out_of_fold(settings.run, settings.data, settings.metadata)
    models = {int(model.path.parent.name[4:]): model for model in find_models([settings.run], threads)}
    trained_with = sorted({Path(noise) for fold in by_fold if (noise := read_config(settings.run / f"fold{fold}")["settings"]["noise"])})
    clip, noise, what = held_back_clips(settings.noise, trained_with) if settings.noise else (made_clip, [], "made noise (wind, rain, insects)")
    tasks = []
    for fold, table in by_fold.items():
        recordings = usable(table.filename, metadata)
        if len(recordings) < settings.per_fold:
            raise UserError(f"fold {fold} of {settings.run} holds out only {len(recordings)} recordings of one species alone; lower --per-fold")
        say(f"fold {fold}: {len(table)} held-out recordings, {len(recordings)} of one species alone, {recordings.primary_label.nunique()} species")
        hands = deal(recordings, settings.per_fold, np.random.default_rng((settings.seed, fold)))
        tasks += [Task(fold, number, hand, clip, models[fold], digest_of(settings, models[fold], hand, noise)) for number, hand in enumerate(hands)]
    return tasks, what


def report(settings: SoundscapeSettings, by_fold: dict[int, list[Scored]], window_seconds: float, background: str) -> None:
    results = measure(by_fold, settings.snr_db, window_seconds, settings.resamples)
    scored = [one for of_fold in by_fold.values() for one in of_fold]
    truth = np.stack([one.truth for one in scored])
    n_species = int((truth.max(axis=(0, 1)) > 0).sum())
    config = read_config(settings.run / f"fold{min(by_fold)}")
    command = (f"python -m benchmarks.soundscapes --run {settings.run.name} --per-fold {settings.per_fold} --seconds {settings.seconds:g} "
               f"--events {settings.events} --snr-db {' '.join(f'{snr:g}' for snr in settings.snr_db)} --seed {settings.seed} --resamples {settings.resamples}")
    if settings.noise:
        command += " --noise " + " ".join(folder.name for folder in settings.noise)
    lines = ["# Composed soundscapes, scored out of fold", "", about(command), "",
             f"`{config['settings']['model']}`, {config['settings']['epochs']} epochs, folds {', '.join(map(str, by_fold))}: {len(scored)} soundscapes of "
             f"{settings.seconds:g} s with {sum(one.events for one in scored)} events of {n_species} of {truth.shape[2]} species; "
             f"{truth.max(axis=2).mean():.0%} of the rows hold a species. Background: {background}.", "",
             "Songs are cut from the fold's held-out recordings of one species alone and scored by that fold's own model. The same soundscape is scored at "
             "each ratio: the RMS of an event's active part (frames of 50 ms) to the background's under it, both over 200 Hz. Events may overlap; a tenth "
             "of each soundscape is one stretch without any. A species is in a 5-second row that holds 0.5 s of an event's active part. "
             "Folds are pooled. Intervals: 95 % bootstraps over soundscapes, not rows: the rows and ratios of one share background and recordings, "
             "and no recording is in two soundscapes." + (FEW if len(scored) < 20 else ""), *markdown(results, by_fold)]
    write_text(settings.results / "soundscapes.md", "\n".join(lines))
    draw(settings.results / "soundscapes.png", results, f"{plots.plain(settings.run.name)}: composed soundscapes, out of fold")
    for snr, scores in results.by_snr.items():
        say(f"  {snr:5g} dB   " + "   ".join(f"{NAMES[name]} {scores[name]}" for name in SHOWN))
    say(f"wrote {settings.results}/soundscapes.md, soundscapes.png and {settings.run}/soundscapes/example.png, example.ogg")


@resumable
def main(argv: list[str] | None = None) -> None:
    settings = parse(SoundscapeSettings, argv, prog="python -m benchmarks.soundscapes", description=__doc__)
    if settings.seconds < 30 or min(settings.per_fold, settings.events, settings.resamples) < 1 or not settings.snr_db:
        raise UserError("--seconds is at least 30, --per-fold, --events and --resamples at least 1, and --snr-db names at least one ratio")
    threads, out = settings.threads or usable_cores(), settings.run / "soundscapes"
    tasks, background = plan(settings, threads)
    say(f"{len(tasks)} soundscapes of {settings.seconds:g} s at {', '.join(f'{snr:g}' for snr in settings.snr_db)} dB; "
        f"background: {background}; {threads} CPU thread(s)")
    by_fold: dict[int, list[Scored]] = {}
    with owned(out):
        for task in progress(tasks, what="composing and scoring", unit="soundscape"):
            by_fold.setdefault(task.fold, []).append(score_soundscape(task, settings, out / f"fold{task.fold}_{task.number}.npz"))
        if not any(one.events for of_fold in by_fold.values() for one in of_fold):
            raise UserError(f"in no held-out recording of {settings.run} does a song stand out; nothing can be composed")
        draw_example(tasks[0], by_fold[tasks[0].fold][0], settings, out)
    report(settings, by_fold, tasks[0].model.audio.window_seconds, background)


if __name__ == "__main__":
    sys.exit(main())
