"""DEMO: makes a data set, runs the six stages on it, scores the submission against the known truth, draws it."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from .console import UserError, resumable, say
from .demo_data import make
from .evaluate import score_submission
from .metadata import read_csv
from .storage import write_table

DATA, RUN, OUT = Path("input/demo"), Path("runs/demo"), Path("submissions/demo.csv")
LEAST_AUC, CHANCE = 0.90, (0.35, 0.65)

STAGES = f"""
src.folds --data {DATA} --out folds/demo.csv --n-folds 3 --overwrite
src.cache --data {DATA} --out input/cache/demo
src.train --config src/recipes/demo.yaml --data {DATA} --folds folds/demo.csv --cache input/cache/demo --noise {DATA}/noise --run {RUN} --fold all
src.evaluate --run {RUN}
src.export --run {RUN}
src.infer --run {RUN} --soundscapes {DATA}/test_soundscapes --out {OUT}
src.evaluate --submission {OUT} --labels {DATA}/soundscape_labels.csv
src.timeline --submission {OUT} --soundscapes {DATA}/test_soundscapes --labels {DATA}/soundscape_labels.csv --out submissions/demo
"""


def permuted(labels: Path, out: Path) -> Path:
    """The same labels on other rows: what a submission scores by chance."""
    table = read_csv(labels)
    table["labels"] = np.random.default_rng(0).permutation(table.labels)
    write_table(out, table)
    return out


@resumable
def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m src.demo", description=__doc__).parse_args(argv)  # it has no settings
    began = time.perf_counter()
    if not (DATA / "train_metadata.csv").exists():
        say(f"making a data set of synthetic birds in {DATA}")
        make(DATA)
    for line in STAGES.strip().splitlines():
        say(f"\n$ python -m {line}")
        if subprocess.run([sys.executable, "-m", *line.split()]).returncode:
            raise UserError(f"python -m {line} failed")
    labels = DATA / "soundscape_labels.csv"
    auc = score_submission(OUT, labels)["macro_roc_auc"].value
    chance = score_submission(OUT, permuted(labels, RUN / "permuted_labels.csv"))["macro_roc_auc"].value
    good = auc >= LEAST_AUC and CHANCE[0] <= chance <= CHANCE[1]
    say(f"\nmacro ROC-AUC on the soundscapes {auc:.3f} (at least {LEAST_AUC} expected), with permuted labels {chance:.3f} "
        f"({CHANCE[0]} to {CHANCE[1]} expected): {'good' if good else 'NOT AS EXPECTED'}")
    say(f"look at submissions/demo/*.png, {RUN}/report.md, {RUN}/fold0/first_batch.png and curves.png; took {time.perf_counter() - began:.0f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
