"""Speech Commands v0.02 (Warden 2018), https://arxiv.org/abs/1804.03209: one word of one second a recording."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..console import UserError
from .layout import LEFT_OUT, DataSet, link


def speech_commands(source: Path, out: Path) -> DataSet:
    """The unpacked archive: a folder of wav files a word, testing_list.txt and validation_list.txt. `_background_noise_` is no class
    (it serves as --noise OUT/train_audio/_background_noise_). The author is the speaker, by the hash in the file's name.

    The established test score comes from a model that saw neither the testing nor the validation list. A fold that is held out would
    put the other list into training, so each list has a table of its own: folds.csv holds out the testing list as fold 0 and leaves the
    validation list out, folds_validation.csv the other way round; all else is always in training.

    fmax is 8 kHz, the recordings' own limit (16 kHz sampling): with the default 16 kHz a fifth of the mel bins would be silent.
    Time masks are a tenth of the window at most, as in the default recipe: its 50 frames would be half a word.
    """
    testing, validation = (read_list(source / f"{name}_list.txt") for name in ("testing", "validation"))
    both = sorted(testing & validation)
    if both:
        raise UserError(f"{source}: {both[0]} stands in testing_list.txt and in validation_list.txt; get the archive again")
    words = [folder for folder in source.iterdir() if folder.is_dir() and not folder.name.startswith(("_", "."))]
    here = {f"{folder.name}/{file.name}" for folder in words for file in folder.glob("*.wav") if not file.name.startswith(".")}
    if not here:
        raise UserError(f"{source} holds no <word>/*.wav; name the folder into which the archive was unpacked")
    names = sorted(here | testing | validation)  # what is listed and not there is counted as missing
    link(source, out / "train_audio")
    recordings = pd.DataFrame({"primary_label": [name.split("/")[0] for name in names], "secondary_labels": "[]",
                               "author": [name.split("/")[1].split("_nohash_")[0] for name in names], "filename": names})
    folds = {"folds.csv": [0 if name in testing else LEFT_OUT if name in validation else -1 for name in names],
             "folds_validation.csv": [0 if name in validation else LEFT_OUT if name in testing else -1 for name in names]}
    return DataSet(recordings, folds=folds, cache={"window_seconds": 1.0, "fmax": 8000.0}, train={"time_mask_frames": 10})


def read_list(file: Path) -> set[str]:
    """The recordings of a list, one `<word>/<speaker>_nohash_<n>.wav` a line. Raises UserError with file and line for any other."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not readable ({error}); it is part of the archive") from error
    for number, line in enumerate(lines, start=1):
        word, _, name = line.partition("/")
        if line and (not word or "/" in name or not name.endswith(".wav")):
            raise UserError(f"{file}, line {number}: {line[:80]!r} is not <word>/<file>.wav; get the archive again")
    return set(filter(None, lines))
