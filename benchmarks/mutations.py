"""240 damaged Ogg files and other oddities among good soundscapes: who is listed, and whether the good ones' rows change.

    python -m benchmarks.mutations

Makes the recordings, damages copies of them in ten ways and scores the folder. Writes benchmarks/results/mutations.md.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from benchmarks.deadline import PRIOR, slow_model
from benchmarks.machine import about
from src import audio
from src.console import say, stage
from src.demo_data import RATE, SPECIES, noise, sing, write_audio
from src.metadata import read_csv
from src.settings import parse
from src.storage import write_text

N_GOOD, N_EACH, SECONDS, TIMEOUT = 8, 24, 12, 600  # the last: seconds after which a run counts as hung


@dataclass(frozen=True)
class MutationSettings:
    seed: int = 0
    """Of the damage."""
    out: Path = Path("benchmarks/results/mutations.md")


def flip(data: bytes, rng: np.random.Generator, n: int, first: int = 0, last: int | None = None) -> bytes:
    changed = np.frombuffer(data, np.uint8).copy()
    places = rng.integers(first, last or len(data), n)
    changed[places] ^= rng.integers(1, 256, n).astype(np.uint8)
    return changed.tobytes()


def stretch(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(len(data)))
    return start, start + int(rng.integers(1, len(data) // 4))


def zeroed(data: bytes, rng: np.random.Generator) -> bytes:
    start, stop = stretch(data, rng)
    return data[:start] + bytes(len(data[start:stop])) + data[stop:]


def deleted(data: bytes, rng: np.random.Generator) -> bytes:
    start, stop = stretch(data, rng)
    return data[:start] + data[stop:]


def doubled(data: bytes, rng: np.random.Generator) -> bytes:
    start, stop = stretch(data, rng)
    return data[:stop] + data[start:stop] + data[stop:]


MUTATIONS: dict[str, Callable[[bytes, np.random.Generator], bytes]] = {
    "one byte changed": lambda data, rng: flip(data, rng, 1),
    "8 bytes changed": lambda data, rng: flip(data, rng, 8),
    "100 bytes changed": lambda data, rng: flip(data, rng, 100),
    "8 bytes of the first 100 changed": lambda data, rng: flip(data, rng, 8, 0, 100),
    "8 bytes of the last 100 changed": lambda data, rng: flip(data, rng, 8, len(data) - 100),
    "cut short": lambda data, rng: data[: rng.integers(1, len(data))],
    "last bytes lost": lambda data, rng: data[: -int(rng.integers(1, 200))],
    "a stretch zeroed": zeroed,
    "a stretch deleted": deleted,
    "a stretch doubled": doubled,
}


def make(root: Path, rng: np.random.Generator) -> dict[str, tuple[str, str]]:
    """good/ and mixed/ (the good ones too); returns the mutated files' stems with their kind and the stem they come from."""
    (root / "mixed").mkdir(parents=True)
    for number in range(N_GOOD):
        sound = noise(SECONDS, "wind", rng) * 0.01
        sing(sound, SPECIES[number], 0.5, 0.3, rng)
        write_audio(root / f"good/g{number}.ogg", sound)
        (root / f"mixed/g{number}.ogg").write_bytes((root / f"good/g{number}.ogg").read_bytes())
    mutated = {}
    for kind, mutate in MUTATIONS.items():
        for number in range(N_EACH):
            stem, origin = f"m{len(mutated):03d}", f"g{number % N_GOOD}"
            (root / f"mixed/{stem}.ogg").write_bytes(mutate((root / f"good/{origin}.ogg").read_bytes(), rng))
            mutated[stem] = (kind, origin)
    return mutated


def make_odd(folder: Path) -> tuple[set[str], set[str]]:
    """Broken files that must be listed, and valid odd ones that must not."""
    whole = (folder / "g0.ogg").read_bytes()
    for name, content in {"empty": b"", "text": b"not audio\n" * 50, "html": b"<html><body>404</body></html>", "head": whole[:60]}.items():
        (folder / f"{name}.ogg").write_bytes(content)
    sound, _ = soundfile.read(folder / "g0.ogg", dtype="float32")
    soundfile.write(folder / "zero_samples.wav", np.zeros(0, np.float32), RATE)
    soundfile.write(folder / "one_sample.wav", np.zeros(1, np.float32), RATE)
    soundfile.write(folder / "stereo.wav", np.stack([sound, sound], axis=1), RATE)
    soundfile.write(folder / "cd_rate.flac", sound, 44_100)
    soundfile.write(folder / "really_wav.ogg", sound, RATE, format="WAV")
    soundfile.write(folder / "really_mp3.ogg", sound, RATE, format="MP3")
    return ({"empty.ogg", "text.ogg", "html.ogg", "head.ogg", "zero_samples.wav"},
            {"one_sample.wav", "stereo.wav", "cd_rate.flac", "really_wav.ogg", "really_mp3.ogg"})


def infer(root: Path, name: str) -> list[str]:
    """The submission's lines. A crash or a hang raises."""
    command = [sys.executable, "-m", "src.infer", "--run", str(root / "run"), "--soundscapes", str(root / name), "--out", str(root / f"{name}.csv"),
               "--threads", "1", "--expected-seconds", str(SECONDS)]
    subprocess.run(command, check=True, timeout=TIMEOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return (root / f"{name}.csv").read_text().splitlines()


def sounds_as(mutated: Path, origin: Path) -> bool:
    """Whether an unlisted file decodes to the very samples of the one it was made from."""
    one, other = audio.read_waveform(mutated, RATE), audio.read_waveform(origin, RATE)
    return len(one) == len(other) and np.array_equal(one, other)


@stage
def main(argv: list[str] | None = None) -> int:
    settings = parse(MutationSettings, argv, prog="python -m benchmarks.mutations", description=__doc__)
    rng = np.random.default_rng(settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        slow_model(root / "run/fold0", layers=1)
        mutated = make(root, rng)
        broken, valid = make_odd(root / "mixed")
        good, mixed = infer(root, "good"), infer(root, "mixed")
        same = sum(line in set(mixed) for line in good[1:])
        listed = set(read_csv(root / "mixed_failures.csv").filename)
        of_model = (np.abs(pd.read_csv(root / "mixed.csv", index_col="row_id") - PRIOR) > 1e-6).any(axis=1)
        scored = {name for name in valid - listed if of_model[of_model.index.str.startswith(Path(name).stem + "_")].all()}
        table = pd.DataFrame([{"kind": kind, "listed": f"{stem}.ogg" in listed,
                               "harmless": f"{stem}.ogg" not in listed and sounds_as(root / f"mixed/{stem}.ogg", root / f"good/{origin}.ogg")}
                              for stem, (kind, origin) in mutated.items()])
    table["undetected"] = ~(table.listed | table.harmless)
    counts = table.groupby("kind", sort=False).sum()
    lines = [f"| {kind} | {row.listed} | {row.harmless} | {row.undetected} |" for kind, row in counts.iterrows()]
    total = counts.sum()
    text = "\n".join([
        "# Mutated recordings", "", about(f"python -m benchmarks.mutations --seed {settings.seed}"), "",
        f"{len(mutated)} mutated copies of {N_GOOD} soundscapes of {SECONDS} s and {len(broken) + len(valid)} odd files, scored in one folder with the good "
        "ones. Listed: named in the failures file with its cause. Harmless: decodes to the samples of the original. Undetected: decodes to as many "
        "samples as its header says, but to others (Vorbis and soundfile report nothing).", "",
        "| mutation | listed | harmless | undetected |", "|---|---|---|---|", *lines,
        f"| **all** | {total.listed} | {total.harmless} | {total.undetected} |", "",
        f"Rows of the good soundscapes that are byte for byte as without the others: {same} of {len(good) - 1}. "
        f"Broken odd files listed: {len(broken & listed)} of {len(broken)}; valid odd files (one sample, stereo, 44.1 kHz, WAV and MP3 "
        f"named .ogg) scored: {len(scored)} of {len(valid)}.",
        ""])
    write_text(settings.out, text)
    say(text)
    return int(same < len(good) - 1 or bool(broken - listed) or scored != valid)


if __name__ == "__main__":
    sys.exit(main())
