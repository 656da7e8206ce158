"""A submission + its soundscapes -> one picture each: spectrogram, probabilities over time and, where given, the truth."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from . import audio, competitions, plots, submission
from .config import AudioConfig
from .console import UserError, progress, say, stage
from .metadata import read_csv
from .soundscapes import Overview, find_soundscapes


def truth_matrix(labels: Path, ids: list[str], classes: list[str]) -> np.ndarray:
    """(rows, C) 0/1 from a CSV of row_id and labels; rows that it does not name hold nothing."""
    table = read_csv(labels)
    if not {"row_id", "labels"} <= set(table.columns):
        raise UserError(f"{labels} needs the columns row_id and labels")
    known = dict(zip(table.row_id, table.labels.str.replace(";", " ").str.split()))
    return np.array([[label in known.get(row, []) for label in classes] for row in ids], float)


@stage
def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m src.timeline", description=__doc__)
    options.add_argument("--submission", type=Path, required=True)
    options.add_argument("--soundscapes", type=Path, required=True)
    options.add_argument("--competition", default=competitions.DEFAULT, metavar="NAME", help="sets the length of a file whose header is unreadable "
                         f"(default: {competitions.DEFAULT})")
    options.add_argument("--recursive", action="store_true", help="also the folder's sub-folders")
    options.add_argument("--labels", type=Path, help="CSV of row_id and labels, drawn as outlines")
    options.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    options.add_argument("--first", type=int, metavar="N", help="draw only the first N soundscapes")
    options = options.parse_args(argv)
    table, config = read_csv(options.submission), AudioConfig()
    if "row_id" not in table:
        raise UserError(f"{options.submission} is no submission: it has no column row_id")
    table = table.set_index("row_id")
    classes = table.columns.tolist()
    seconds = competitions.competition(options.competition).soundscape_seconds
    soundscapes = find_soundscapes(options.soundscapes, seconds, recursive=options.recursive)[: options.first]
    for soundscape in progress(soundscapes, what="drawing", unit="file"):
        ids, seconds = submission.row_ids(soundscape.name, soundscape.n_rows), soundscape.n_rows * submission.ROW_SECONDS
        absent = [row for row in ids if row not in table.index]
        if absent:
            raise UserError(f"{options.submission} lacks the row {absent[0]} of {soundscape.path}")
        try:
            probability = table.loc[ids].astype(float).to_numpy()
        except ValueError as error:
            raise UserError(f"{options.submission} holds no probability in a row of {soundscape.path}: {error}") from error
        stream, overview = audio.LogMelStream(config), Overview(config, seconds)
        try:
            for block in audio.read_blocks(soundscape.path, config.sample_rate):
                overview.push(stream.push(block))
            overview.push(stream.finish())
        except audio.DamagedAudio as error:
            say(f"{soundscape.path.name}: {error}")
        plots.timeline(options.out / f"{soundscape.name}.png", overview.image(seconds), probability, classes, config,
                       row_seconds=submission.ROW_SECONDS, heading=soundscape.path.name,
                       truth=truth_matrix(options.labels, ids, classes) if options.labels else None)
    say(f"wrote {len(soundscapes)} picture(s) to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
