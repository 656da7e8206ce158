"""Logistic regression on log-mel statistics, over the same folds as a run: what a network has to beat.

    python -m benchmarks.logistic_baseline --data DATA --folds FOLDS --cache CACHE [--metadata FILE]

Features: windows normalised as the networks' are, then each mel band's mean, standard deviation, 90th percentile and mean step from frame to
frame over the recording, standardised; C = 1.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from src import metrics
from src.cache import Cache
from src.console import say, stage
from src.folds import read_folds
from src.metadata import read_metadata, targets
from src.models.log_mel_input import normalised
from src.settings import parse


@dataclass(frozen=True)
class BaselineSettings:
    data: tuple[Path, ...] = (Path("input/birdclef-2023"),)
    folds: Path = Path("folds/birdclef-2023.csv")
    cache: Path = Path("input/cache/birdclef-2023")
    metadata: Path | None = None


def features(cache: Cache, name: str) -> np.ndarray:
    """(4 n_mels,) mean, standard deviation, 90th percentile and mean step over time."""
    config = cache.config
    decibels = torch.from_numpy(cache.read(name).astype(np.float32).T * config.db_step + config.db_min)
    windows = decibels.split(config.window_frames, dim=1)
    windows = windows[:-1] if len(windows) > 1 and windows[-1].shape[1] < config.window_frames // 2 else windows
    x = torch.cat([normalised(window[None, None])[0, 0] for window in windows], dim=1).numpy()  # (n_mels, frames)
    return np.concatenate([x.mean(axis=1), x.std(axis=1), np.percentile(x, 90, axis=1), np.abs(np.diff(x)).mean(axis=1)])


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
