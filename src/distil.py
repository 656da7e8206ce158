"""Trained runs -> a file of soft labels for --soft-labels: out-of-fold for what they were trained on, predictions for the rest."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from . import devices
from .cache import Cache
from .config import differences
from .console import UserError, say, stage
from .evaluate import out_of_fold
from .export import load_model
from .metadata import read_metadata
from .predict import predict
from .settings import parse
from .soft_labels import UNSEEN
from .storage import fold_folders, owned_file, write_table


@dataclass(frozen=True)
class DistilSettings:
    run: tuple[Path, ...] = (Path("runs/asca"),)
    """The teachers; several are averaged. Each needs the same folds and classes."""
    out: Path = Path("input/soft_labels.csv")
    data: tuple[Path, ...] = ()
    """Further folders in BirdCLEF's layout that no teacher was trained on; primary_label may be empty there."""
    home: tuple[Path, ...] = ()
    """Where the teachers' own recordings lie, if no longer where they lay when these were trained."""
    metadata: Path | None = None
    """Another table in train_metadata.csv's columns, if not the teachers'."""
    cache: Path | None = None
    """Where the further folders' log-mels are; by default the first run's cache."""
    device: str = "auto"


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(DistilSettings, argv, prog="python -m src.distil", description=__doc__)
    tables, known, first = [], set(), None
    for run in settings.run:
        folds, metadata, config = out_of_fold(run, settings.home, settings.metadata)
        known |= set(metadata.table.recording_id)
        first = first or config
        table = pd.concat([table.assign(source=str(fold)) for fold, table in folds.items()]).set_index(["filename", "source"]).sort_index()
        if tables and (not table.index.equals(tables[0].index) or list(table) != list(tables[0])):
            raise UserError(f"{run} and {settings.run[0]} differ in folds or classes; their out-of-fold predictions cannot be averaged")
        tables.append(table)
    mean = sum(tables) / len(tables)
    if settings.data:
        mean = pd.concat([mean, unseen(settings, first, known)])
    with owned_file(settings.out):
        write_table(settings.out, mean.reset_index(), float_format="%.6g")
    say(f"wrote {settings.out}: {len(tables[0])} recordings out of fold, {len(mean) - len(tables[0])} unseen; {len(settings.run)} teacher run(s)")


def unseen(settings: DistilSettings, config: dict, known: set[str]) -> pd.DataFrame:
    """The further folders' recordings that are not `known` to any teacher, each the mean over all folds of all teachers.

    `config`: the first teacher's. Raises UserError where there are none, or a teacher's audio recipe is not the cache's.
    """
    first = (settings.home or (Path(config["settings"]["data"][0]),))[0]
    everything = read_metadata((first, *settings.data), settings.metadata or config["settings"]["metadata"]).table
    cache = Cache(settings.cache or Path(config["settings"]["cache"]))
    new = everything[everything.is_extra & ~everything.recording_id.isin(known)]
    names = [name for name in new.filename if name in cache]
    if not names:
        raise UserError(f"{', '.join(map(str, settings.data))}: no recording there is new to the teachers and lies in the cache {cache.folder}; "
                        "run src.cache with this folder among --data")
    accelerator = devices.start(device=settings.device, precision="auto", accumulate=1, threads=0)
    found = []
    for run in settings.run:
        for folder in fold_folders(run, "weights.safetensors"):
            model, teacher = load_model(folder)
            if changed := differences(teacher["audio"], cache.config.to_dict()):
                raise UserError(f"{cache.folder} holds another recipe than {run} was trained on ({'; '.join(changed)}); name its --cache")
            found.append(predict(model.to(accelerator.device), names, cache, accelerator, batch_size=32))
    index = pd.MultiIndex.from_product([names, [UNSEEN]], names=["filename", "source"])
    return pd.DataFrame(np.mean(found, axis=0), index, config["classes"])


if __name__ == "__main__":
    sys.exit(main())
