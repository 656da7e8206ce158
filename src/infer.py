"""STAGE 6: soundscapes + models -> submission.csv. On a CPU, without torch."""

from __future__ import annotations

import argparse
import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from . import audio, submission
from .config import AudioConfig
from .console import UserError, progress, say, stage
from .onnx_models import OnnxModel, find_models
from .storage import atomic, safe_cell

QUEUED_BATCHES = 16  # decoded ahead of the model


@dataclass
class Soundscape:
    """One long recording on its way to rows."""

    path: Path
    n_rows: int
    seconds_decoded: float = 0.0
    fault: str = ""


def find_soundscapes(folder: Path, expected_seconds: float) -> list[Soundscape]:
    """The audio files of a folder, by name, with their numbers of rows from their headers."""
    if not folder.is_dir():
        raise UserError(f"--soundscapes {folder} is no folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in audio.SUFFIXES and path.is_file())
    stems = pd.Series([path.stem for path in paths], dtype=str)
    if stems.duplicated().any():
        raise UserError(f"{folder}: two files are named {stems[stems.duplicated()].iloc[0]}; rows are named by the stem, so rename one")
    soundscapes = []
    for path in paths:
        try:
            soundscapes.append(Soundscape(path, submission.n_rows(audio.read_header(path).seconds)))
        except audio.DamagedAudio as error:
            soundscapes.append(Soundscape(path, submission.n_rows(expected_seconds), fault=f"no readable header: {error}"))
    return soundscapes


class WindowStream:
    """Waveform blocks -> windows (1, n_mels, window_frames) cut from the file's own log-mel, in bounded memory."""

    def __init__(self, config: AudioConfig, starts: np.ndarray) -> None:
        self.config, self.stream = config, audio.LogMelStream(config)
        self.starts = np.rint(starts * config.frames_per_second).astype(int)  # frames
        self.next, self.first_frame = 0, 0  # the next window; the frame at which `frames` begins
        self.frames = np.empty((config.n_mels, 0), np.float32)

    def push(self, block: np.ndarray) -> list[np.ndarray]:
        return self._cut(self.stream.push(block))

    def finish(self) -> list[np.ndarray]:
        """The windows that reach over the end: padded with silence."""
        windows = self._cut(self.stream.finish())
        end = int(self.starts[-1]) + self.config.window_frames
        missing = max(0, end - self.first_frame - self.frames.shape[1])
        return windows + self._cut(np.full((self.config.n_mels, missing), self.config.db_min, np.float32))

    def _cut(self, frames: np.ndarray) -> list[np.ndarray]:
        self.frames = np.concatenate([self.frames, frames], axis=1)
        windows, n = [], self.config.window_frames
        while self.next < len(self.starts):
            offset = self.starts[self.next] - self.first_frame
            if offset + n > self.frames.shape[1]:
                break
            windows.append(self.frames[None, :, offset : offset + n])
            self.next += 1
        if windows:  # forget what no window needs any more
            offset = (self.starts[self.next] - self.first_frame) if self.next < len(self.starts) else self.frames.shape[1]
            self.first_frame += min(offset, self.frames.shape[1])
            self.frames = self.frames[:, offset:]
        return windows


Batch = tuple[int, AudioConfig | None, np.ndarray | None]  # soundscape, recipe, windows; (i, None, None): it is done


def decode(soundscapes: list[Soundscape], starts: list[dict[AudioConfig, np.ndarray]], batch_size: int) -> Iterator[Batch]:
    """Decodes each soundscape once and yields its windows in batches, for every distinct recipe."""
    for number, soundscape in enumerate(soundscapes):
        if not soundscape.fault:
            yield from _decode_one(number, soundscape, starts[number], batch_size)
        yield number, None, None


def _decode_one(number: int, soundscape: Soundscape, starts: dict[AudioConfig, np.ndarray], batch_size: int) -> Iterator[Batch]:
    rates = {config.sample_rate for config in starts}
    for rate in sorted(rates):  # one, unless the models' recipes differ in it
        streams = {config: WindowStream(config, at) for config, at in starts.items() if config.sample_rate == rate}
        waiting: dict[AudioConfig, list[np.ndarray]] = {config: [] for config in streams}
        n_samples = 0
        try:
            for block in audio.read_blocks(soundscape.path, rate):
                n_samples += len(block)
                for config, stream in streams.items():
                    waiting[config] += stream.push(block)
                    while len(waiting[config]) >= batch_size:
                        yield number, config, np.stack(waiting[config][:batch_size])
                        del waiting[config][:batch_size]
        except audio.DamagedAudio as error:
            soundscape.fault = str(error)
        soundscape.seconds_decoded = n_samples / rate
        for config, stream in streams.items():
            waiting[config] += stream.finish()
            for first in range(0, len(waiting[config]), batch_size):
                yield number, config, np.stack(waiting[config][first : first + batch_size])


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Runs an iterator in a thread, so that decoding goes on while the model computes; passes on its exceptions."""
    done, items, stopped = object(), queue.Queue(QUEUED_BATCHES), threading.Event()

    def work() -> None:
        try:
            for item in batches:
                while not stopped.is_set():
                    try:
                        items.put((item, None), timeout=0.2)
                        break
                    except queue.Full:
                        continue
                if stopped.is_set():
                    return
            items.put((done, None))
        except BaseException as error:
            items.put((done, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stopped.set()


def score(soundscapes: list[Soundscape], models: list[OnnxModel], classes: Sequence[str], *, hop_seconds: float, batch_size: int) -> np.ndarray:
    """(all rows, C): the mean over the models of each row's probabilities; rows of which nothing decodes get the prior."""
    order = {model.path: [model.classes.index(label) for label in classes] for model in models}
    prior = np.mean([model.prior[order[model.path]] for model in models], axis=0)
    recipes = {model.audio for model in models}
    starts = [{config: submission.window_starts(s.n_rows, config.window_seconds, hop_seconds) for config in recipes} for s in soundscapes]
    rows: list[np.ndarray] = []
    pending: dict[Path, list[np.ndarray]] = {model.path: [] for model in models}
    n_windows = sum(len(at) for s, of in zip(soundscapes, starts) for at in of.values() if not s.fault)
    with progress(what="scoring", total=n_windows, unit="window") as bar:
        for number, config, windows in ahead(decode(soundscapes, starts, batch_size)):
            if config is not None:
                for model in models:
                    if model.audio == config:
                        pending[model.path].append(model.probabilities(windows)[:, order[model.path]])
                bar.update(len(windows))
                continue
            soundscape = soundscapes[number]
            if pending[models[0].path]:
                by_model = [submission.rows_from_windows(np.concatenate(pending[m.path]), starts[number][m.audio], m.audio.window_seconds, soundscape.n_rows)
                            for m in models]
                mean = np.mean(by_model, axis=0)
            else:
                mean = np.tile(prior, (soundscape.n_rows, 1))
            begins = np.arange(soundscape.n_rows) * submission.ROW_SECONDS
            mean[begins >= max(soundscape.seconds_decoded, 1e-9)] = prior
            rows.append(mean)
            pending = {path: [] for path in pending}
    return np.concatenate(rows) if rows else np.empty((0, len(classes)), np.float32)


def choose_columns(models: list[OnnxModel], sample: Path | None, soundscapes: Path) -> tuple[str, ...]:
    """The sample submission's species in its order, else the models'. Raises UserError where they differ."""
    classes = models[0].classes
    sample = sample or soundscapes.resolve().parent / "sample_submission.csv"
    if not sample.exists():
        return classes
    columns = submission.columns_of_sample(sample)
    missing, extra = sorted(set(columns) - set(classes)), sorted(set(classes) - set(columns))
    if missing or extra:
        raise UserError(f"{sample} and the models differ in species: only in the sample {missing[:5]} ({len(missing)}), only in the models "
                        f"{extra[:5]} ({len(extra)}); name the right file with --sample")
    return columns


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m src.infer", description=__doc__)
    options.add_argument("--run", type=Path, nargs="+", default=[Path("runs/asca")], help="runs whose folds are averaged (default: runs/asca)")
    options.add_argument("--soundscapes", type=Path, help="folder of long recordings (default: input/birdclef-2023/test_soundscapes)")
    options.add_argument("--out", type=Path, default=Path("submissions/asca.csv"), help="(default: submissions/asca.csv)")
    options.add_argument("--sample", type=Path, help="sample submission that gives the columns (default: the one beside the soundscapes' folder)")
    options.add_argument("--hop-seconds", type=float, default=5.0, help="between windows; under 5 they overlap (default: 5)")
    options.add_argument("--expected-seconds", type=float, default=600.0, help="length of a file whose header is unreadable (default: 600)")
    options.add_argument("--batch-size", type=int, default=8, help="windows a call (default: 8)")
    options.add_argument("--threads", type=int, default=0, help="of the model; 0: all cores (default: 0)")
    options.add_argument("--check", type=Path, metavar="FILE", help="only validate a submission (with --soundscapes also its rows, with --sample its columns)")
    return options


@stage
def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    if options.check:
        return report(options.check, options.sample, options.soundscapes, options.expected_seconds)
    folder = options.soundscapes or Path("input/birdclef-2023/test_soundscapes")
    if not 0 < options.hop_seconds <= submission.ROW_SECONDS or options.batch_size < 1 or options.expected_seconds <= 0:
        raise UserError("--hop-seconds must be within (0, 5], --batch-size and --expected-seconds positive")
    threads = options.threads or os.cpu_count() or 1
    soundscapes = find_soundscapes(folder, options.expected_seconds)
    models = find_models(options.run, threads)
    classes = choose_columns(models, options.sample, folder)
    ids = [row for s in soundscapes for row in submission.row_ids(s.path.stem, s.n_rows)]
    say(f"{len(soundscapes)} soundscapes in {folder}, {len(ids)} rows, {len(classes)} species; {len(models)} model(s) on {threads} CPU thread(s)")
    probability = score(soundscapes, models, classes, hop_seconds=options.hop_seconds, batch_size=options.batch_size)
    submission.write(options.out, ids, probability, classes)
    failures = options.out.with_name(options.out.stem + "_failures.csv")
    damaged = [s for s in soundscapes if s.fault]
    if damaged:
        with atomic(failures) as partial:
            pd.DataFrame([[safe_cell(s.path.name), f"{s.seconds_decoded:.2f}", safe_cell(s.fault)] for s in damaged],
                         columns=["filename", "seconds_decoded", "cause"]).to_csv(partial, index=False, lineterminator="\n")
        say(f"{len(damaged)} damaged soundscape(s), listed in {failures}; their missing stretches hold the prior")
    else:
        failures.unlink(missing_ok=True)
    faults = submission.check(options.out, classes=classes, ids=ids)
    say(f"wrote {options.out}: {len(ids)} rows x {len(classes)} species, {'valid' if not faults else 'NOT VALID'}")
    for fault in faults:
        say(f"  {fault}")
    return int(bool(faults))


def report(file: Path, sample: Path | None, folder: Path | None, expected_seconds: float) -> int:
    """Prints the validator's verdict; 0 where the file is valid."""
    ids = None
    if folder is not None:
        ids = [row for s in find_soundscapes(folder, expected_seconds) for row in submission.row_ids(s.path.stem, s.n_rows)]
    faults = submission.check(file, classes=submission.columns_of_sample(sample) if sample else None, ids=ids)
    say(f"{file}: {'valid' if not faults else 'NOT VALID'}")
    for fault in faults:
        say(f"  {fault}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
