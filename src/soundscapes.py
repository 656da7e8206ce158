"""A folder of long recordings -> batches of windows, decoded once, ahead of the model, in bounded memory."""

from __future__ import annotations

import atexit
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from . import audio, submission
from .config import AudioConfig
from .console import UserError, say
from .containers import mp3_fault

QUEUED_BATCHES = 16  # decoded ahead of the model
AT_EXIT_SECONDS = 3.0  # the process waits no longer for a decoder that a hung disk holds up
OTHER_SOUND = (".m4a", ".mp4", ".aac", ".wma", ".amr", ".3gp", ".caf", ".w64", ".wac", ".mov", ".avi", ".mkv", ".webm", ".mts")  # ffmpeg reads most
NOT_RECORDINGS = ("$RECYCLE.BIN", "System Volume Information")  # what Windows keeps on a disk or a memory card
OVERVIEW_COLUMNS = 2000  # as many as a screen shows


@dataclass
class Soundscape:
    """One long recording on its way to rows."""

    path: Path
    name: str  # below the folder, without the suffix, "/" between: what its row ids begin with
    seconds: float  # by the header
    sample_rate: int  # Hz, of the file; 0: its header is unreadable
    n_rows: int
    seconds_decoded: float = 0.0
    fault: str = ""
    starts: dict[AudioConfig, np.ndarray] = field(default_factory=dict)  # seconds at which its windows start, per recipe
    overview: Overview | None = None


def find_soundscapes(folder: Path, expected_seconds: float, *, recursive: bool = False, to_the_end: bool = False) -> list[Soundscape]:
    """The audio files of a folder, by name, with their numbers of rows (`submission.n_rows`) from their headers. Hidden files are passed over,
    links that lead nowhere are damaged recordings."""
    try:
        if not folder.is_dir():
            raise UserError(f"--soundscapes {folder} is no folder; name the one that holds the long recordings")
        files = [path for path in (_below(folder) if recursive else folder.iterdir()) if not path.name.startswith(".")]
        paths = sorted(path for path in files if path.suffix.lower() in audio.SUFFIXES and (path.is_file() or not path.exists()))
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror or error}; grant yourself access, or move it away") from error
    foreign = [path for path in files if path.suffix.lower() in OTHER_SOUND]
    if foreign:
        say(f"{folder}: {len(foreign)} file(s) of other kinds are passed over, {foreign[0].name} for one; ffmpeg -i OLD NEW.flac converts them")
    odd = [path for path in paths if any("\udc80" <= mark <= "\udcff" for mark in str(path))]  # bytes that are no text
    if odd:
        raise UserError(f"{ascii(str(odd[0]))}: its name is not UTF-8 ({len(odd)} such name(s)); rename it (convmv -f latin1 -t utf8 does whole folders)")
    names = [path.relative_to(folder).with_suffix("").as_posix() for path in paths]
    doubled = pd.Series(names, dtype=str)[lambda name: name.duplicated()]
    if len(doubled):
        raise UserError(f"{folder}: two files are named {doubled.iloc[0]}; rows are named by the stem, so rename one")
    soundscapes = []
    for path, name in zip(paths, names):
        try:
            header = audio.read_header(path)
            seconds, sample_rate, fault = header.seconds, header.sample_rate, ""
        except audio.DamagedAudio as error:
            seconds, sample_rate, fault = expected_seconds, 0, f"no readable header: {error}"
        soundscapes.append(Soundscape(path, name, seconds, sample_rate, submission.n_rows(seconds, to_the_end=to_the_end), fault=fault))
    return soundscapes


def beside(folder: Path, pattern: str) -> list[Path]:
    """The files of that name beside the folder; where it is a link, also those beside what it leads to."""
    parents = dict.fromkeys([Path(os.path.abspath(folder)).parent, folder.resolve().parent])
    return [path for parent in parents for path in sorted(parent.glob(pattern))]


def _below(folder: Path) -> list[Path]:
    """The files in a folder, its sub-folders and those that are linked there, each once; a link to a folder that lies below anyway adds nothing."""
    root, seen, found = folder.resolve(), set(), []
    for at, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        real = Path(at).resolve()
        if real in seen or real.is_relative_to(root) and real != root / Path(at).relative_to(folder):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in NOT_RECORDINGS)
        found += [Path(at, name) for name in names]
    return found


def _raise(error: OSError) -> None:
    raise error


class Overview:
    """Log-mel blocks -> a picture of at most 2,000 columns: each is the loudest of its stretch, so that short calls stay."""

    def __init__(self, config: AudioConfig, seconds: float) -> None:
        self.step = max(1, int(np.ceil(seconds * config.frames_per_second / OVERVIEW_COLUMNS)))  # frames a column
        self.config, self.n_frames = config, 0
        self.columns: list[np.ndarray] = []  # (n_mels, few)
        self.rest = np.empty((config.n_mels, 0), np.float32)

    def push(self, frames: np.ndarray) -> None:
        self.n_frames += frames.shape[1]
        frames = np.concatenate([self.rest, frames], axis=1)
        whole = frames.shape[1] // self.step * self.step
        self.columns.append(frames[:, :whole].reshape(len(frames), -1, self.step).max(axis=2))
        self.rest = frames[:, whole:].copy()

    def image(self, seconds: float) -> np.ndarray:
        """(n_mels, columns) dB of the first `seconds`; what was not decoded is silence."""
        last = self.rest.max(axis=1, keepdims=True) if self.rest.shape[1] else self.rest
        image = np.concatenate([*self.columns, last], axis=1)[:, : self._n_columns(seconds)]
        return np.pad(image, ((0, 0), (0, self._n_columns(seconds) - image.shape[1])), constant_values=self.config.db_min)

    def _n_columns(self, seconds: float) -> int:
        return max(1, round(seconds * self.config.frames_per_second / self.step))


class WindowStream:
    """Waveform blocks -> windows (1, n_mels, window_frames) cut from the file's own log-mel, in bounded memory."""

    def __init__(self, config: AudioConfig, starts: np.ndarray, overview: Overview | None = None) -> None:
        self.config, self.stream, self.overview = config, audio.LogMelStream(config), overview
        self.starts = np.rint(starts * config.frames_per_second).astype(int)  # frames
        self.next, self.first_frame = 0, 0  # the next window; the frame at which `frames` begins
        self.frames = np.empty((config.n_mels, 0), np.float32)

    def push(self, block: np.ndarray) -> list[np.ndarray]:
        return self._cut(self._seen(self.stream.push(block)))

    def finish(self) -> list[np.ndarray]:
        """The windows that reach over the end: padded with silence, but a recording shorter than a window is repeated, as in training.

        Where the header promised more, those without any sound are left out: their number has no bound, and a row's length behind the end
        they reach no row that any model heard.
        """
        windows = self._cut(self._seen(self.stream.finish()))
        n, n_window = self.frames.shape[1], self.config.window_frames
        heard = self.first_frame + n + submission.ROW_SECONDS * self.config.frames_per_second
        self.starts = self.starts[: max(1, self.next, int(np.searchsorted(self.starts, heard)))]
        if self.next == 0 and 0 < n < n_window:
            windows += self._cut(self.frames[:, np.arange(n, n_window) % n])
        end = int(self.starts[-1]) + n_window
        missing = max(0, end - self.first_frame - self.frames.shape[1])
        return windows + self._cut(np.full((self.config.n_mels, missing), self.config.db_min, np.float32))

    def _seen(self, frames: np.ndarray) -> np.ndarray:
        if self.overview is not None:
            self.overview.push(frames)
        return frames

    def _cut(self, frames: np.ndarray) -> list[np.ndarray]:
        self.frames = np.concatenate([self.frames, frames], axis=1)
        windows, n = [], self.config.window_frames
        while self.next < len(self.starts):
            offset = self.starts[self.next] - self.first_frame
            if offset + n > self.frames.shape[1]:
                break
            windows.append(self.frames[None, :, offset : offset + n])
            self.next += 1
        if windows or self.next == len(self.starts):  # forget what no window needs any more
            offset = (self.starts[self.next] - self.first_frame) if self.next < len(self.starts) else self.frames.shape[1]
            self.first_frame += min(offset, self.frames.shape[1])
            self.frames = self.frames[:, offset:]
        return windows


Batch = tuple[int, AudioConfig | None, np.ndarray | None]  # soundscape, recipe, windows; (i, None, None): it is done


def decode(soundscapes: list[Soundscape], starts_of: Callable[[Soundscape], dict[AudioConfig, np.ndarray]], batch_size: int, *,
           overviews: bool = False) -> Iterator[Batch]:
    """Decodes each soundscape once and yields its windows in batches, for every distinct recipe.

    `starts_of` is asked as each soundscape begins, so that a changed plan holds from the next one on.
    """
    for number, soundscape in enumerate(soundscapes):
        if not soundscape.fault:
            soundscape.starts = starts_of(soundscape)
            if overviews:
                soundscape.overview = Overview(next(iter(soundscape.starts)), soundscape.seconds)
            yield from _decode_one(number, soundscape, batch_size)
        yield number, None, None


def _decode_one(number: int, soundscape: Soundscape, batch_size: int) -> Iterator[Batch]:
    starts, overview = soundscape.starts, soundscape.overview
    rates = dict.fromkeys(config.sample_rate for config in starts)  # one, unless the models' recipes differ in it;
    for rate in rates:  # the first model's first: where the time is short, the last ones are dropped
        streams = {config: WindowStream(config, at, overview if overview is not None and overview.config == config else None)
                   for config, at in starts.items() if config.sample_rate == rate}
        waiting: dict[AudioConfig, list[np.ndarray]] = {config: [] for config in streams}
        n_samples = 0
        try:
            for block in audio.read_blocks(soundscape.path, rate):
                n_samples += len(block)
                soundscape.seconds_decoded = max(soundscape.seconds_decoded, n_samples / rate)
                for config, stream in streams.items():
                    waiting[config] += stream.push(block)
                    while len(waiting[config]) >= batch_size:
                        yield number, config, np.stack(waiting[config][:batch_size])
                        del waiting[config][:batch_size]
            grew = soundscape.sample_rate > 0 and soundscape.seconds_decoded > soundscape.seconds + submission.ROW_SECONDS
            fault = mp3_fault(soundscape.path) or ("grew while it was being read: its end is not scored" if grew else "")
        except (audio.DamagedAudio, OSError) as error:
            fault = str(error)
        soundscape.fault = soundscape.fault or fault  # the scorer's "the time was up" may stand there
        for config, stream in streams.items():
            waiting[config] += stream.finish()
            for first in range(0, len(waiting[config]), batch_size):
                yield number, config, np.stack(waiting[config][first : first + batch_size])


def ahead(batches: Iterator[Batch], left: Callable[[], float] = lambda: float("inf")) -> Iterator[Batch]:
    """Runs an iterator in a thread, so that decoding goes on while the model computes; passes on its exceptions.

    Ends early when nothing came within the seconds `left`.
    """
    done, items, stopped = object(), queue.Queue(QUEUED_BATCHES), threading.Event()

    def put(item: object, error: BaseException | None = None) -> bool:
        while not stopped.is_set():
            try:
                items.put((item, error), timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in batches:
                if not put(item):
                    return
            put(done)
        except BaseException as error:
            put(done, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            try:
                item, error = items.get(timeout=min(max(0.0, left()), threading.TIMEOUT_MAX))
            except queue.Empty:
                return
            if error is not None:
                raise error
            if item is done:
                return
            yield item
    finally:
        stopped.set()
        if thread.is_alive():  # in C++, say; Python ends by an abort where it finds such a thread
            atexit.register(thread.join, AT_EXIT_SECONDS)
