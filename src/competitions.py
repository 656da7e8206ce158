"""What differs between the BirdCLEF years: one table."""

from __future__ import annotations

from dataclasses import dataclass

from .console import UserError


@dataclass(frozen=True)
class Competition:
    """Rows are the same every year: row_id = file stem + "_" + end second, one row per 5 seconds."""

    n_classes: int
    n_soundscapes: int  # of the hidden test
    soundscape_seconds: float
    metric: str  # a key of metrics.score
    cpu_minutes: float  # for the whole notebook
    metadata: str  # the recordings' table
    taxonomy: str  # labels and names; eBird's or the competition's own
    row_id: str  # an example
    soundscape_labels: str = ""  # labelled training soundscapes


COMPETITIONS = {
    "birdclef-2023": Competition(264, 200, 600, "padded_cmap", 120, "train_metadata.csv", "eBird_Taxonomy_v2021.csv", "soundscape_29201_5"),
    "birdclef-2024": Competition(182, 1100, 240, "macro_roc_auc", 120, "train_metadata.csv", "eBird_Taxonomy_v2021.csv", "soundscape_1446779_5"),
    "birdclef-2025": Competition(206, 700, 60, "macro_roc_auc", 90, "train.csv", "taxonomy.csv", "soundscape_8358733_5"),
    "birdclef-2026": Competition(234, 600, 60, "macro_roc_auc", 90, "train.csv", "taxonomy.csv", "BC2026_Test_0001_S05_20250227_010002_5",
                                 "train_soundscapes_labels.csv"),
}
DEFAULT = "birdclef-2023"


def competition(name: str) -> Competition:
    if name not in COMPETITIONS:
        raise UserError(f"--competition {name} is not known; known are {', '.join(COMPETITIONS)}")
    return COMPETITIONS[name]
