"""What species are called, and from which probability on each counts as detected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from .console import UserError, say
from .metadata import read_csv
from .soundscapes import beside

NAME_COLUMNS = (("SPECIES_CODE", "SCI_NAME", "PRIMARY_COM_NAME"), ("SPECIES_CODE", "SCIENTIFIC_NAME", "COMMON_NAME"),
                ("primary_label", "scientific_name", "common_name"))  # eBird's taxonomy, the same from its web service, BirdCLEF's

Names = dict[str, tuple[str, str]]  # label -> scientific name, common name; "" where unknown


def read_names(file: Path | None, folder: Path) -> Names:
    """Species' names from a taxonomy (eBird's columns or BirdCLEF's), by default from a table beside the soundscapes' folder."""
    candidates = [file] if file else [path for pattern in ("taxonomy.csv", "eBird_Taxonomy_v*.csv", "train_metadata.csv") for path in beside(folder, pattern)]
    for path in candidates:
        table = read_csv(path)
        label, scientific, common = next((names for names in NAME_COLUMNS if names[0] in table and {*names[1:]} & {*table}), (None, None, None))
        if label is None and file:
            raise UserError(f"{path} lacks a species' code or its names ({' or '.join(', '.join(names) for names in NAME_COLUMNS)}); name another --taxonomy")
        if label is None:
            say(f"{path} is passed over: it does not name species")
            continue
        empty = pd.Series("", table.index)
        return dict(zip(table[label], zip(table.get(scientific, empty), table.get(common, empty))))
    return {}


def choose_thresholds(classes: Sequence[str], names: Names, *, threshold: float, per_species: Path | None, species: Path | None) -> np.ndarray:
    """(C,) the probability from which a species counts as detected; infinite for species that are not on the list."""
    thresholds = pd.Series(threshold, classes, dtype=float)
    if per_species is not None:
        table = read_csv(per_species)
        if not {"primary_label", "threshold"} <= set(table.columns):
            raise UserError(f"{per_species} needs the columns primary_label and threshold")
        values = pd.to_numeric(table.threshold, errors="coerce")
        if not values.between(0, 1).all():
            row = int(np.flatnonzero(~values.between(0, 1))[0])
            raise UserError(f"{per_species}, row {row + 2}: threshold {table.threshold[row]!r} is not within 0 and 1")
        _tell_unknown(per_species, table.primary_label[~table.primary_label.isin(classes)])
        known = table.primary_label.isin(classes)
        thresholds[table.primary_label[known]] = values[known].to_numpy()
    if species is not None:
        listed = _read_species(species, classes, names)
        thresholds[~thresholds.index.isin(listed)] = np.inf
    return thresholds.to_numpy()


def _read_species(file: Path, classes: Sequence[str], names: Names) -> set[str]:
    """The labels that a list names by code, scientific or common name, or as BirdNET does: Scientific name_Common name."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not a readable list of species: {error}") from error
    labels_of: dict[str, set[str]] = {}  # several may share a name
    for label in classes:
        for name in filter(None, names.get(label, ())):
            labels_of.setdefault(name.casefold(), set()).add(label)
    labels_of |= {label: {label} for label in classes}
    listed, unknown = set(), []
    for line in filter(None, lines):
        found = next((labels_of[key] for part in (line, *line.split("_")) for key in (part, part.casefold()) if key in labels_of), set())
        listed |= found
        unknown += [line] * (not found)
    if not listed:
        raise UserError(f"{file} names none of the models' species ({', '.join(classes[:5])}, ...); one code or name a line")
    _tell_unknown(file, unknown)
    return listed


def _tell_unknown(file: Path, unknown: Sequence[str]) -> None:
    if len(unknown):
        say(f"{file}: {len(unknown)} line(s) of no species of the models are passed over: {', '.join(list(unknown)[:5])}")
