"""Soundscapes whose truth is known: songs cut from recordings, at random moments over background noise, at any signal-to-noise ratio."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice

import numpy as np
import pandas as pd
from scipy.ndimage import binary_closing
from scipy.signal import butter, sosfiltfilt

from src import audio
from src.demo_data import RATE
from src.submission import ROW_SECONDS

FRAME = RATE // 20  # samples: levels, onsets and truth are counted in frames of 50 ms
ROW_FRAMES = round(ROW_SECONDS * 20)
LOWEST = 200  # Hz: levels are measured above it, where birds sing; a recording's rumble is no song, the wind's is no rival
BELOW_PEAK, ABOVE_FLOOR = 20, 10  # dB: a frame is active within the one of its recording's loudest, and over the other above its 10th percentile
GAP = 6  # frames: syllables at most so far apart are one song
SONG_FRAMES = 40, 160  # shortest and longest cut: 2 to 8 s
LEAST_ACTIVE = 20  # frames that a cut holds at least, where the recording has them
PRESENT = 10  # frames, 0.5 s, of an event's active part make its species present in a row
BACKGROUND = 0.01  # RMS, of full scale
QUIET_SHARE = 0.1  # of a soundscape is one stretch without any event
CROSSFADE = RATE // 2  # samples, between two pieces of background
STAY = 60 * RATE  # samples: a shorter piece comes again until then, as a place keeps its sound for a while

Clip = Callable[[np.random.Generator], np.ndarray]  # draws a piece of background noise


@dataclass(frozen=True)
class Event:
    filename: str
    label: str
    start: int  # frame of the soundscape
    active: np.ndarray  # (frames of the event,) bool


@dataclass(frozen=True)
class Composition:
    """Background, and the songs each at 0 dB of it: (n_samples,) float32 both, at `RATE`."""

    background: np.ndarray
    songs: np.ndarray
    events: list[Event]
    unusable: set[str] = field(default_factory=set)  # recordings in which no song stands out

    def at(self, snr_db: float) -> np.ndarray:
        """The soundscape with every event at this ratio; turned down as a whole where it would clip."""
        sound = self.background + np.float32(10 ** (snr_db / 20)) * self.songs
        return sound * np.float32(min(1.0, 0.9 / np.abs(sound).max()))

    def truth(self, classes: Sequence[str], n_rows: int) -> np.ndarray:
        """(n_rows, C) 0/1: a species is in a row that holds `PRESENT` or more active frames of one of its events."""
        truth = np.zeros((n_rows, len(classes)), np.float32)
        for event in self.events:
            in_row = np.bincount((event.start + np.flatnonzero(event.active)) // ROW_FRAMES, minlength=n_rows)[:n_rows]
            truth[in_row >= PRESENT, classes.index(event.label)] = 1
        return truth


def over_rumble(sound: np.ndarray) -> np.ndarray:
    """(n,) -> (n,) what lies over `LOWEST`, not shifted in time."""
    return sosfiltfilt(butter(4, LOWEST, "highpass", fs=RATE, output="sos"), sound)


def power(sound: np.ndarray) -> np.ndarray:
    """(n_samples,) -> (n_samples // FRAME,) mean square of each whole frame."""
    return np.square(sound[: len(sound) // FRAME * FRAME].reshape(-1, FRAME)).mean(axis=1)


def active_frames(recording: np.ndarray) -> np.ndarray:
    """(frames,) bool: where a recording's song is. Steady noise has none, and neither has a song that never pauses."""
    level = 10 * np.log10(power(over_rumble(recording)) + 1e-12)
    loud = level > max(level.max() - BELOW_PEAK, np.percentile(level, 10) + ABOVE_FLOOR)
    return binary_closing(np.pad(loud, GAP), np.ones(GAP + 1))[GAP:-GAP]


def cut_song(recording: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    """A stretch of 2 to 8 s that holds song, faded over a frame at both ends, and its active frames; None where no song stands out."""
    if len(recording) < 4 * FRAME:
        return None
    active = active_frames(recording)
    length = min(len(active), int(rng.integers(SONG_FRAMES[0], SONG_FRAMES[1] + 1)))
    held = np.convolve(active, np.ones(length, int), "valid")  # active frames of a cut from each frame on
    if held.max() < PRESENT:
        return None
    start = int(rng.choice(np.flatnonzero(held >= min(LEAST_ACTIVE, held.max()))))
    song = recording[start * FRAME : (start + length) * FRAME].copy()
    fade = np.linspace(0, 1, FRAME, dtype=np.float32)
    song[:FRAME] *= fade
    song[-FRAME:] *= fade[::-1]
    return song, active[start : start + length]


def background(clip: Clip, n_samples: int, rng: np.random.Generator) -> np.ndarray:
    """(n_samples,) float32: pieces of noise one after the other, each again and again for a minute, at the RMS `BACKGROUND` over the rumble."""
    sound = np.zeros(n_samples + CROSSFADE, np.float32)
    at, fade = 0, np.sqrt(np.linspace(0, 1, CROSSFADE, dtype=np.float32))
    while at < n_samples:
        piece = clip(rng)
        piece = piece * np.float32(BACKGROUND / np.sqrt(np.square(over_rumble(piece)).mean()))
        piece[:CROSSFADE] *= fade
        piece[-CROSSFADE:] *= fade[::-1]
        until = min(at + STAY, n_samples)
        while at < until:
            heard = piece[: len(sound) - at]
            sound[at : at + len(heard)] += heard
            at += len(piece) - CROSSFADE
    return sound[CROSSFADE:]


def compose(recordings: pd.DataFrame, clip: Clip, *, seconds: float, n_events: int, rng: np.random.Generator) -> Composition:
    """Events from the recordings (filename, path, primary_label) in turn, again and again; their onsets are uniform outside one quiet stretch.

    An event's ratio is that of its RMS to the background's, over its own active frames and over `LOWEST`.
    """
    n = round(seconds * RATE)
    composition = Composition(background(clip, n, rng), np.zeros(n, np.float32), [])
    noise_power = power(over_rumble(composition.background))
    n_frames = len(noise_power)
    quiet = round(QUIET_SHARE * n_frames)
    quiet_from = int(rng.integers(n_frames - quiet + 1))
    for filename, song, active, label in islice(_songs(recordings, composition.unusable, rng), n_events):
        free = np.arange(n_frames - len(active) + 1)
        free = free[(free + len(active) <= quiet_from) | (free >= quiet_from + quiet)]
        start = int(rng.choice(free))
        wanted = noise_power[start : start + len(active)][active].mean()
        gain = np.sqrt(wanted / power(over_rumble(song))[active].mean())
        composition.songs[start * FRAME : start * FRAME + len(song)] += np.float32(gain) * song
        composition.events.append(Event(filename, label, start, active))
    return composition


def _songs(recordings: pd.DataFrame, unusable: set[str], rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray, np.ndarray, str]]:
    for row in cycle(recordings.itertuples()):
        if len(unusable) == len(recordings):
            return
        if row.filename in unusable:
            continue
        try:
            cut = cut_song(audio.read_waveform(row.path, RATE), rng)
        except audio.DamagedAudio:
            cut = None
        if cut is None:
            unusable.add(row.filename)
        else:
            yield row.filename, *cut, row.primary_label


def deal(recordings: pd.DataFrame, hands: int, rng: np.random.Generator) -> list[pd.DataFrame]:
    """The recordings shared out, none to two hands, every species' first ones before its second ones."""
    shuffled = recordings.iloc[rng.permutation(len(recordings))]
    turn = shuffled.groupby("primary_label").cumcount()
    shuffled = shuffled.iloc[np.argsort(turn.to_numpy(), kind="stable")]
    return [shuffled.iloc[hand::hands] for hand in range(hands)]
