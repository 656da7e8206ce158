"""Data sets of clips cut from YouTube videos: the rows of their tables, and the clips as the common downloaders name them."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..audio import SUFFIXES
from ..console import UserError
from .layout import link

VIDEO, SECONDS = re.compile(r"[\w-]+", re.ASCII), re.compile(r"\d+(\.\d*)?", re.ASCII)


@dataclass(frozen=True)
class Clip:
    """A stretch of a video, in seconds."""

    video: str
    start: float
    end: float

    def stems(self) -> tuple[str, ...]:
        """The names that it may have: <id>, Y<id>, and <id>_<start>[_<end>] in milliseconds, in seconds, and with six digits (VGGSound's own)."""
        start, end = self.start, self.end
        times = (f"{start:06.0f}", f"{1000 * start:.0f}_{1000 * end:.0f}", f"{1000 * start:.0f}", f"{start:.0f}_{end:.0f}", f"{start:.3f}_{end:.3f}",
                 f"{start:.0f}")
        return *(f"{self.video}_{time}" for time in times), self.video, f"Y{self.video}"


def read_rows(file: Path, form: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(line, fields) of a CSV without a header, whose first fields are a video's id and seconds (all fields named *seconds are).

    Lines that begin with # are passed over; a blank may follow a comma. Raises UserError with file and line where a row has another form.
    """
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            reader = csv.reader(lines, skipinitialspace=True)
            for row in reader:
                if not row or row[0].startswith("#"):
                    continue
                numbers = [value for name, value in zip(form, row) if name.endswith("seconds")]
                if len(row) != len(form) or not VIDEO.fullmatch(row[0]) or not all(map(SECONDS.fullmatch, numbers)):
                    raise UserError(f"{file}, line {reader.line_num}: {', '.join(row)[:80]!r} is not {', '.join(form)}; correct the line or delete it")
                yield reader.line_num, row
    except FileNotFoundError:
        raise UserError(f"{file} does not exist; SOURCE holds it beside the clips") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} is not a readable CSV file: {error}; obtain it again") from error


def link_clips(clips: Sequence[Clip], source: Path, out: Path) -> list[str]:
    """Links the folder that holds all clips as `out`/train_audio and returns each one's file name there, `<id>_<start>.wav` where it is missing.

    The clips may lie at any depth below `source`; a file is one clip, the first that it fits. Raises UserError where none is there, or one is
    a link out of that folder.
    """
    found, others = {}, set()
    for folder, folders, files in os.walk(source, followlinks=True):
        folders[:] = sorted(name for name in folders if Path(folder, name).resolve() != out.resolve())  # its link would lead back here
        for name in sorted(files):
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES:
                found.setdefault(stem, Path(folder, name))
            elif suffix.lower() in (".mp4", ".m4a", ".webm", ".mkv", ".aac"):
                others.add(suffix.lower())
    paths = [next((found.pop(stem) for stem in clip.stems() if stem in found), None) for clip in clips]
    if not any(paths):
        why = f"there are {', '.join(sorted(others))} files: convert them to wav or flac first" if others else "clips are named <id>.wav or <id>_<start>.wav"
        raise UserError(f"none of the {len(clips)} clips is below {source}; {why}")
    root = Path(os.path.commonpath([path.parent for path in paths if path]))
    if stray := next((path for path in paths if path and not path.resolve().is_relative_to(root.resolve())), None):
        raise UserError(f"{stray} leads out of {root} by a link, which the next stages refuse; move all clips below one real folder")
    link(root, out / "train_audio")
    return [path.relative_to(root).as_posix() if path else f"{clip.stems()[0]}.wav" for clip, path in zip(clips, paths)]
