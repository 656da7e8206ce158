"""Makes a small data set in BirdCLEF's layout: a dozen synthetic species, noise, and soundscapes whose truth is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from .storage import atomic, write_table
from .submission import ROW_SECONDS, row_ids

RATE = 32_000  # Hz
SOUNDSCAPE_SECONDS = 120
RECORDISTS = ("A. Audubon", "B. Gould", "C. Thorburn", "D. Fuertes", "E. Keulemans", "F. Lear", "G. Tunnicliffe", "")


@dataclass(frozen=True)
class Species:
    code: str
    name: str
    start: float  # Hz at a syllable's start
    end: float  # Hz at its end
    bend: float  # Hz added in its middle
    seconds: float  # of a syllable
    gap: float  # seconds between syllables
    count: int  # syllables of a phrase
    warble: float = 0.0  # Hz of frequency modulation
    harmonics: int = 1
    recordings: int = 14


SPECIES = (
    Species("demdov1", "Demo Dove", 480, 440, 60, 0.45, 0.25, 3, harmonics=2),
    Species("demowl1", "Demo Owl", 800, 700, 0, 0.7, 0.5, 2, harmonics=2),
    Species("demcuc1", "Demo Cuckoo", 1300, 1000, 0, 0.25, 0.2, 4),
    Species("demthr1", "Demo Thrush", 1800, 2600, 500, 0.3, 0.1, 5, warble=120),
    Species("demrob1", "Demo Robin", 3000, 2200, 900, 0.18, 0.05, 8),
    Species("demtit1", "Demo Tit", 5200, 5200, 0, 0.12, 0.08, 10),
    Species("demwar1", "Demo Warbler", 3800, 6500, 0, 0.07, 0.03, 16),
    Species("demcis1", "Demo Cisticola", 3400, 3400, 0, 1.6, 0.1, 1, warble=700),
    Species("demkin1", "Demo Kinglet", 7200, 8200, 0, 0.1, 0.1, 9),
    Species("demcro1", "Demo Crow", 900, 800, 150, 0.35, 0.3, 3, warble=60, harmonics=8),
    Species("demrar1", "Demo Rail", 2500, 1500, 0, 0.05, 0.04, 20, harmonics=3, recordings=2),
    Species("demnig1", "Demo Nightjar", 1600, 1900, 0, 0.03, 0.02, 40, harmonics=4, recordings=2),
)


def phrase(species: Species, rng: np.random.Generator) -> np.ndarray:
    """One song phrase of one individual, peak 1: pitch, tempo and number of syllables vary."""
    pitch, tempo = rng.normal(1, 0.03), rng.normal(1, 0.08)
    pieces = []
    for _ in range(max(1, species.count + rng.integers(-1, 2))):
        n = max(64, int(species.seconds * tempo * RATE))
        t = np.linspace(0, 1, n)
        hertz = pitch * (species.start + (species.end - species.start) * t + species.bend * np.sin(np.pi * t))
        hertz += species.warble * np.sin(2 * np.pi * 30 * species.seconds * t)
        angle = 2 * np.pi * np.cumsum(hertz) / RATE
        tone = sum(np.sin(h * angle) / h for h in range(1, species.harmonics + 1))
        pieces += [tone * np.sin(np.pi * t) ** 0.5, np.zeros(int(species.gap * tempo * RATE))]
    song = np.concatenate(pieces)
    return (song / np.abs(song).max()).astype(np.float32)


def noise(seconds: float, kind: str, rng: np.random.Generator) -> np.ndarray:
    """Field-like noise, RMS about 1: wind (low), rain (bright, with drops), insects (a band that pulses)."""
    n = int(seconds * RATE)
    spectrum = np.fft.rfft(rng.standard_normal(n))
    hertz = np.fft.rfftfreq(n, 1 / RATE)
    shape = {"wind": 1 / np.maximum(hertz, 60), "rain": np.sqrt(np.maximum(hertz, 300)) / 100,
             "insects": np.exp(-(((hertz - 9000) / 700) ** 2)) + 0.003}[kind] + 2e-4
    sound = np.fft.irfft(spectrum * shape, n)
    t = np.arange(n) / RATE
    swell = 1 + 0.5 * np.sin(2 * np.pi * t * rng.uniform(0.05, 0.2) + rng.uniform(0, 6))
    if kind == "insects":
        swell = swell * (1 + 0.8 * np.sin(2 * np.pi * t * rng.uniform(8, 14)))
    sound = sound * swell
    return (sound / sound.std()).astype(np.float32)


def sing(sound: np.ndarray, species: Species, start: float, amplitude: float, rng: np.random.Generator) -> float:
    """Adds one phrase at `start` seconds and returns its end in seconds."""
    song = phrase(species, rng) * amplitude
    first = int(start * RATE)
    song = song[: max(0, len(sound) - first)]
    sound[first : first + len(song)] += song
    return (first + len(song)) / RATE


def write_audio(path: Path, sound: np.ndarray) -> None:
    with atomic(path) as partial, soundfile.SoundFile(partial, "w", RATE, 1, format="OGG", subtype="VORBIS") as file:
        for first in range(0, len(sound), RATE):  # libsndfile's Vorbis encoder crashes on minutes in one call
            file.write(np.clip(sound[first : first + RATE], -1, 1))


def make_recordings(root: Path, rng: np.random.Generator) -> pd.DataFrame:
    """train_audio/ and its metadata: one recordist has a noisy microphone, some recordings hold a second species."""
    rows, number = [], 1000
    for species in SPECIES:
        for _ in range(species.recordings):
            number += 1
            seconds, author = rng.uniform(4, 12), RECORDISTS[rng.integers(len(RECORDISTS))]
            level = 0.3 * 10 ** (rng.uniform(-12, 0) / 20)
            sound = noise(seconds, ("wind", "rain", "insects")[rng.integers(3)], rng) * level * 10 ** (rng.uniform(-26, -14) / 20)
            at = rng.uniform(0, 0.5)
            while at < seconds - 0.3:
                at = sing(sound, species, at, level, rng) + rng.uniform(0.3, 2.5)
            secondary = []
            if rng.random() < 0.15:
                other = SPECIES[rng.integers(len(SPECIES) - 2)]
                if other.code != species.code:
                    sing(sound, other, rng.uniform(0, seconds / 2), level / 4, rng)
                    secondary = [other.code]
            name = f"{species.code}/XC{number}.ogg"
            write_audio(root / "train_audio" / name, sound)
            rows.append({"primary_label": species.code, "secondary_labels": str(secondary), "type": "['song']",
                         "latitude": f"{rng.uniform(-2, 2):.4f}", "longitude": f"{rng.uniform(34, 38):.4f}",
                         "scientific_name": f"Demo {species.code}", "common_name": species.name, "author": author, "license": "CC0",
                         "rating": f"{rng.integers(2, 11) / 2}", "url": f"https://example.org/{number}", "filename": name})
    return pd.DataFrame(rows)


def make_soundscape(path: Path, rng: np.random.Generator) -> pd.DataFrame:
    """A soundscape with songs well over the noise to barely; returns its rows' labels (0.8 s of song in the row or more)."""
    sound = (noise(SOUNDSCAPE_SECONDS, "wind", rng) + 0.4 * noise(SOUNDSCAPE_SECONDS, "insects", rng)) * 0.01
    n = int(SOUNDSCAPE_SECONDS / ROW_SECONDS)
    labels: list[set[str]] = [set() for _ in range(n)]
    for species in SPECIES:
        for _ in range(3 if species.recordings > 2 else 1):
            start, amplitude = rng.uniform(0, SOUNDSCAPE_SECONDS - 6), 0.03 * 10 ** (rng.uniform(0, 15) / 20)
            end = sing(sound, species, start, amplitude, rng)
            end = sing(sound, species, end + 0.3, amplitude, rng)
            for row in range(n):
                if min(end, (row + 1) * ROW_SECONDS) - max(start, row * ROW_SECONDS) >= 0.8:
                    labels[row].add(species.code)
    write_audio(path, sound)
    return pd.DataFrame({"row_id": row_ids(path.stem, n), "labels": [" ".join(sorted(row)) for row in labels]})


def make(root: Path, seed: int = 0) -> None:
    """Writes the whole data set; the same bytes of metadata and labels for the same seed."""
    rng = np.random.default_rng(seed)
    metadata = make_recordings(root, rng)
    broken = root / "train_audio" / metadata.filename[3]
    broken.write_bytes(broken.read_bytes()[:-4000])  # a download that broke off
    for kind in ("wind", "rain", "insects"):
        for number in range(3):
            write_audio(root / "noise" / f"{kind}{number}.ogg", noise(12, kind, rng) * 0.05)
    labels = pd.concat([make_soundscape(root / "test_soundscapes" / f"soundscape_{number}.ogg", rng) for number in (1, 2)])
    tables = {
        "soundscape_labels.csv": labels,
        "eBird_Taxonomy_v2021.csv": pd.DataFrame({"SPECIES_CODE": [s.code for s in SPECIES], "PRIMARY_COM_NAME": [s.name for s in SPECIES]}),
        "sample_submission.csv": pd.DataFrame([["soundscape_1_5"] + [0] * len(SPECIES)], columns=["row_id", *sorted(s.code for s in SPECIES)]),
        "train_metadata.csv": metadata,  # last: where it lies, the data set is whole
    }
    for name, table in tables.items():
        write_table(root / name, table)
