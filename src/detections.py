"""Probabilities -> what field ecologists open: Raven selection tables, Audacity labels, CSV, pictures; one of each per recording."""

from __future__ import annotations

import csv
import io
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from .audio import CANNOT_OPEN
from .config import AudioConfig, differences
from .console import UserError, say
from .soundscapes import Overview, Soundscape
from .species import Names
from .storage import append_to_journal, atomic, journal_line, owned, read_journal, safe_cell, write_text
from .submission import ROW_SECONDS

SUFFIXES = {"raven": ".raven.txt", "audacity": ".audacity.txt", "csv": ".detections.csv"}
RAVEN = ("Selection", "View", "Channel", "Begin File", "Begin Time (s)", "End Time (s)", "Low Freq (Hz)", "High Freq (Hz)", "Common Name", "Score")
CSV = ("file", "start_s", "end_s", "label", "scientific_name", "common_name", "probability")
ENDS = 2**16  # bytes of a recording's begin and of its end
JOURNAL, ALL = "done.jsonl", "all_detections.csv"
ENTRY = {"file", "seconds_decoded", "fault"}  # what a line of the journal holds, beside _state
LONGEST_NAME = 255  # bytes


@dataclass(frozen=True)
class Detection:
    start: float  # seconds
    end: float
    label: str
    probability: float  # the highest of its rows


def find_detections(probability: np.ndarray, known: np.ndarray, classes: Sequence[str], thresholds: np.ndarray, seconds: float) -> list[Detection]:
    """(n, C) rows at or above their species' threshold (C,), neighbours merged; rows that are not `known` (n,) hold none."""
    found = []
    above = (probability >= thresholds) & known[:, None]
    for species in np.flatnonzero(above.any(axis=0)):
        edges = np.flatnonzero(np.diff(np.concatenate([[False], above[:, species], [False]]).astype(int)))
        for first, stop in zip(edges[::2], edges[1::2]):
            end = max(min(stop * ROW_SECONDS, seconds), first * ROW_SECONDS)
            found.append(Detection(first * ROW_SECONDS, end, classes[species], float(probability[first:stop, species].max())))
    return sorted(found, key=lambda d: (d.start, -d.probability, d.label))


def _text_cell(text: str) -> str:
    """One cell of a table for people: no tab or line break, no formula."""
    return safe_cell(" ".join(text.split()) if any(mark in text for mark in "\t\r\n") else text)


def raven(detections: Sequence[Detection], file: str, names: Names, band: tuple[float, float]) -> str:
    """A Raven selection table, tab separated."""
    lines = ["\t".join(RAVEN)]
    for number, d in enumerate(detections, start=1):
        lines.append("\t".join([str(number), "Spectrogram 1", "1", _text_cell(file.rpartition("/")[2]), f"{d.start:.3f}", f"{d.end:.3f}",
                                f"{band[0]:.0f}", f"{band[1]:.0f}", _text_cell(_common(d.label, names)), f"{d.probability:.4f}"]))
    return "\n".join(lines) + "\n"


def audacity(detections: Sequence[Detection], names: Names) -> str:
    """An Audacity label track: start, end, label."""
    return "".join(f"{d.start:.6f}\t{d.end:.6f}\t{_text_cell(_common(d.label, names))} {d.probability:.2f}\n" for d in detections)


def table(detections: Sequence[Detection], file: str, names: Names) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV)
    for d in detections:
        writer.writerow([_text_cell(file), f"{d.start:.3f}", f"{d.end:.3f}", _text_cell(d.label), *map(_text_cell, names.get(d.label, ("", ""))),
                         f"{d.probability:.4f}"])
    return text.getvalue()


def _common(label: str, names: Names) -> str:
    return names.get(label, ("", ""))[1] or label


class DetectionTables:
    """A folder of tables (and pictures) per recording, written as each is done; the same settings again go on with the others.

    A journal holds the settings, and a line per recording that is done: its size and time, what decoded, its fault.
    Raises UserError where the folder holds tables of other settings.
    """

    def __init__(self, folder: Path, soundscapes: Path, formats: Sequence[str], classes: Sequence[str], thresholds: np.ndarray, names: Names, *,
                 config: AudioConfig, settings: dict, pictures: Path | None = None, restart: bool = False) -> None:
        self.folder, self.soundscapes, self.formats, self.pictures = folder, soundscapes, formats, pictures
        self.classes, self.thresholds, self.names, self.config = classes, thresholds, names, config
        finite = {label: float(value) for label, value in zip(classes, thresholds) if np.isfinite(value)}
        used = {label: list(names[label]) for label in finite if label in names}
        self.recipe = {**settings, "formats": sorted(formats), "pictures": bool(pictures), "thresholds": finite,
                       "names_crc32": zlib.crc32(json.dumps(used, sort_keys=True).encode())}
        if pictures:
            try:
                pictures.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"--pictures {pictures} cannot be made: {error.strerror or error}; name another folder") from error
        self._held = ExitStack()
        self._held.enter_context(owned(folder))
        self.restart, self.entries = restart, {} if restart else self._read_journal()
        self.gone: list[Soundscape] = []  # done in an earlier run, and no longer in the folder: on another memory card, say

    def __enter__(self) -> DetectionTables:
        return self

    def __exit__(self, *failure: object) -> None:
        self._held.close()

    def _read_journal(self) -> dict[str, dict]:
        """The recordings that are done; a line that is damaged, the torn last one for instance, costs its own recording alone."""
        recipe, *records = read_journal(self.folder / JOURNAL) or [{}]
        if not recipe:
            return {}
        entries = {record["file"]: record for record in records if record.keys() >= ENTRY}
        changed = differences(recipe, self.recipe)
        if changed:
            raise UserError(f"{self.folder} holds detections of other settings ({'; '.join(changed[:5])}{'; ...' if len(changed) > 5 else ''}); "
                            "name another --tables, or begin anew with --restart")
        return entries

    def to_do(self, soundscapes: Sequence[Soundscape], *, again: bool = False) -> list[Soundscape]:
        """The soundscapes whose tables are not there yet, or whose recording has changed; all, if they are done `again`. What earlier runs did of
        recordings that are no longer in the folder stays."""
        require_names_that_fit([path for s in soundscapes for path in self._outputs(s).values()])
        if self.restart:
            self._clear()
        done, names = {} if again else self.entries, {s.name for s in soundscapes}
        kept = {s.name: entry for s in soundscapes if (entry := done.get(self._file(s))) and self._is_done(s, entry)}
        earlier = [Soundscape(self.soundscapes / file, PurePosixPath(file).with_suffix("").as_posix(), 0.0, 0, 0, entry["seconds_decoded"], entry["fault"])
                   for file, entry in self.entries.items() if "bytes" in entry and CANNOT_OPEN not in entry["fault"]]
        self.gone = [s for s in earlier if s.name not in names and self._has_tables(s)]
        if self.gone:
            say(f"{self.folder}: {len(self.gone)} recording(s) of earlier runs, {self._file(self.gone[0])} for one, are no longer in {self.soundscapes}; "
                "their tables stay (--restart deletes them)")
        kept |= {s.name: self.entries[self._file(s)] for s in self.gone}
        for soundscape in soundscapes:
            if soundscape.name in kept:
                soundscape.seconds_decoded, soundscape.fault = kept[soundscape.name]["seconds_decoded"], kept[soundscape.name]["fault"]
        self.entries = {entry["file"]: entry for entry in kept.values()}
        write_text(self.folder / JOURNAL, "".join(map(journal_line, [self.recipe, *self.entries.values()])))
        return [s for s in soundscapes if s.name not in kept]

    def _clear(self) -> None:
        """Deletes the tables that the folder's journal names: other settings' tables are not left among the new ones."""
        recipe, *records = read_journal(self.folder / JOURNAL) or [{}]
        names = [PurePosixPath(record["file"]).with_suffix("") for record in records if record.keys() >= ENTRY]
        for path in [self.folder / f"{name}{SUFFIXES[kind]}" for name in names for kind in recipe.get("formats", ()) if not {"..", "/"} & {*name.parts}]:
            path.unlink(missing_ok=True)
        (self.folder / ALL).unlink(missing_ok=True)

    def _is_done(self, soundscape: Soundscape, entry: dict) -> bool:
        state = _state(soundscape.path)
        whole = bool(state) and entry.items() >= state.items() and CANNOT_OPEN not in entry["fault"]
        return whole and self._has_tables(soundscape)

    def _has_tables(self, soundscape: Soundscape) -> bool:
        outputs = self._outputs(soundscape)
        if not all(path.exists() for path in outputs.values()):
            return False
        if "csv" in outputs:
            require_our_csv(outputs["csv"])
        return True

    def _outputs(self, soundscape: Soundscape) -> dict[str, Path]:
        tables = {name: self.folder / (soundscape.name + SUFFIXES[name]) for name in self.formats}
        return tables | ({"picture": self.pictures / f"{soundscape.name}.png"} if self.pictures else {})

    def _file(self, soundscape: Soundscape) -> str:
        return soundscape.path.relative_to(self.soundscapes).as_posix()

    def add(self, soundscape: Soundscape, probability: np.ndarray, known: np.ndarray) -> None:
        """Writes a recording's tables: (n, C) probabilities and (n,) whether the models made them."""
        file, outputs = self._file(soundscape), self._outputs(soundscape)
        detections = find_detections(probability, known, self.classes, self.thresholds, soundscape.seconds)
        texts = {"raven": lambda: raven(detections, file, self.names, (self.config.fmin, min(self.config.fmax, soundscape.sample_rate / 2))),
                 "audacity": lambda: audacity(detections, self.names), "csv": lambda: table(detections, file, self.names)}
        for name in self.formats:
            write_text(outputs[name], texts[name]())
        if self.pictures:
            self._draw(outputs["picture"], soundscape, np.where(known[:, None], probability, 0.0))
        entry = {"file": file, **_state(soundscape.path), "seconds_decoded": soundscape.seconds_decoded, "fault": soundscape.fault}
        append_to_journal(self.folder / JOURNAL, entry)
        self.entries[file] = entry

    def _draw(self, path: Path, soundscape: Soundscape, probability: np.ndarray) -> None:
        from . import plots  # here, since a submission needs no matplotlib

        seconds = soundscape.n_rows * ROW_SECONDS
        overview = soundscape.overview or Overview(self.config, seconds)
        shown = np.isfinite(self.thresholds)
        plots.timeline(path, overview.image(seconds), probability[:, shown], [_common(label, self.names)
                       for label in np.array(self.classes)[shown]], overview.config, row_seconds=ROW_SECONDS, heading=self._file(soundscape))

    def finish(self, soundscapes: Sequence[Soundscape]) -> list[Soundscape]:
        """One table of all recordings, where CSV is asked for. Returns these and the earlier runs' recordings, by name."""
        soundscapes = sorted([*self.gone, *soundscapes], key=lambda soundscape: soundscape.path)
        if "csv" not in self.formats:
            return soundscapes
        with atomic(self.folder / ALL) as partial, open(partial, "w", encoding="utf-8", newline="") as whole:
            whole.write(",".join(CSV) + "\n")
            for soundscape in soundscapes:
                if self._file(soundscape) in self.entries:
                    whole.write(self._outputs(soundscape)["csv"].read_text(encoding="utf-8").partition("\n")[2])
        return soundscapes


def require_our_csv(path: Path) -> None:
    """Raises UserError for a table that another program saved again in its own way: all_detections.csv is made of them."""
    try:
        ours = path.read_text(encoding="utf-8").partition("\n")[0] == ",".join(CSV)
    except UnicodeDecodeError:
        ours = False
    if not ours:
        raise UserError(f"{path} was saved again by another program (a spreadsheet, say) with other separators, columns or encoding; "
                        "move it away, and it is made again")


def require_names_that_fit(paths: Sequence[Path]) -> None:
    """Raises UserError, ahead of hours of scoring, for a name that no common file system takes."""
    for path in paths:
        if len(os.fsencode(f"{path.name}.partial")) > LONGEST_NAME:
            raise UserError(f"{path.name}: the name is too long for a file; give the recording a shorter one")


def _state(path: Path) -> dict[str, int]:
    """By which a changed recording is known; empty where it cannot be read. Another memory card may hold the same names, sizes and times."""
    try:
        with open(path, "rb") as file:
            facts, ends = os.fstat(file.fileno()), zlib.crc32(file.read(ENDS))
            file.seek(max(0, facts.st_size - ENDS))
            ends = zlib.crc32(file.read(ENDS), ends)
    except OSError:
        return {}
    return {"bytes": facts.st_size, "mtime_ns": facts.st_mtime_ns, "ends_crc32": ends}
