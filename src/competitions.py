"""What differs between the BirdCLEF years: one table."""

from __future__ import annotations

from dataclasses import dataclass

from .console import UserError


@dataclass(frozen=True)
class Competition:
    """Rows are the same every year: row_id = file stem + "_" + end second, one row per 5 seconds."""

    soundscape_seconds: float
    metric: str  # a key of metrics.score
    cpu_minutes: float  # for the whole notebook
    metadata: str  # the recordings' table
    taxonomy: str  # labels and names; eBird's or the competition's own
    soundscape_labels: str = ""  # labelled training soundscapes


COMPETITIONS = {
    "birdclef-2023": Competition(600, "padded_cmap", 120, "train_metadata.csv", "eBird_Taxonomy_v2021.csv"),
    "birdclef-2024": Competition(240, "macro_roc_auc", 120, "train_metadata.csv", "eBird_Taxonomy_v2021.csv"),
    "birdclef-2025": Competition(60, "macro_roc_auc", 90, "train.csv", "taxonomy.csv"),
    "birdclef-2026": Competition(60, "macro_roc_auc", 90, "train.csv", "taxonomy.csv", "train_soundscapes_labels.csv"),
}
DEFAULT = "birdclef-2023"


def competition(name: str) -> Competition:
    if name not in COMPETITIONS:
        raise UserError(f"--competition {name} is not known; known are {', '.join(COMPETITIONS)}")
    return COMPETITIONS[name]
