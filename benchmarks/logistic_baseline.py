"""Logistic regression on log-mel statistics, over the same folds as a run: what a network has to beat.

    python -m benchmarks.logistic_baseline --data DATA --folds FOLDS --cache CACHE [--metadata FILE]

Features: each mel band's mean and standard deviation over the recording, standardised; C = 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from src import metrics
from src.cache import Cache
from src.console import say, stage
from src.folds import read_folds
from src.metadata import read_metadata, targets
from src.settings import parse


@dataclass(frozen=True)
class BaselineSettings:
    data: tuple[Path, ...] = (Path("input/birdclef-2023"),)
    folds: Path = Path("folds/birdclef-2023.csv")
    cache: Path = Path("input/cache/birdclef-2023")
    metadata: Path | None = None


def features(cache: Cache, name: str) -> np.ndarray:
    """(2 n_mels,) mean and standard deviation over time, in steps of the cache's scale."""
    log_mel = cache.read(name).astype(np.float32)
    return np.concatenate([log_mel.mean(axis=0), log_mel.std(axis=0)])


def out_of_fold(data: tuple[Path, ...], metadata_file: Path | None, folds_file: Path, cache_folder: Path) -> pd.DataFrame:
    """(held-out recordings by filename, classes): each one's probabilities from a model that never saw its fold."""
    metadata, cache, fold_of = read_metadata(data, metadata_file), Cache(cache_folder), read_folds(folds_file)
    table = metadata.table[metadata.table.filename.isin(cache.names)].reset_index(drop=True)
    folds = table.filename.map(fold_of).fillna(-1).to_numpy()
    x = np.stack([features(cache, name) for name in table.filename])
    probability = pd.DataFrame(0.0, table.filename, list(metadata.classes))
    for fold in sorted(set(folds[folds >= 0])):
        training, held_out = (folds != fold) & (folds != -2), folds == fold
        model = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
        model.fit(x[training], table.primary_label[training])
        probability.loc[table.filename[held_out], list(model.classes_)] = model.predict_proba(x[held_out])
    return probability[folds >= 0]


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(BaselineSettings, argv, prog="python -m benchmarks.logistic_baseline", description=__doc__)
    probability = out_of_fold(settings.data, settings.metadata, settings.folds, settings.cache)
    metadata = read_metadata(settings.data, settings.metadata)
    scored = metadata.table.set_index("filename").loc[probability.index].reset_index()
    target, _ = targets(scored, metadata.classes)
    for name, estimate in metrics.score(target, probability.to_numpy()).items():
        say(f"{name:14s} {estimate}")


if __name__ == "__main__":
    sys.exit(main())
