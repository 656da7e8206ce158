"""The data sets that src.prepare knows: one dict, name -> reads SOURCE, puts the audio below OUT, and returns the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..competitions import COMPETITIONS
from .audioset import audioset
from .birdclef import birdclef
from .esc import esc
from .layout import DataSet
from .speech_commands import speech_commands
from .ucr import ucr
from .vggsound import vggsound

SOURCES: dict[str, Callable[[Path, Path], DataSet]] = {
    **{name: partial(birdclef, year=year) for name, year in COMPETITIONS.items()},
    "esc50": partial(esc, only_ten=False), "esc10": partial(esc, only_ten=True),
    "audioset": audioset, "vggsound": vggsound, "speech_commands": speech_commands, "ucr": ucr,
}
