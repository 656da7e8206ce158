"""A submission + its soundscapes -> one picture each: spectrogram, probabilities over time and, where given, the truth."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from . import audio, competitions, plots, submission
from .config import AudioConfig
from .console import UserError, progress, say, stage
from .soundscapes import Overview, find_soundscapes


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
    if options.first is not None and options.first < 1:
        raise UserError(f"--first {options.first} must be 1 or more")
    table, config = submission.read_rows(options.submission), AudioConfig()
    present, classes = submission.read_labels(options.labels) if options.labels else None, table.columns.tolist()
    if present and not {*present} & {*table.index}:
        raise UserError(f"{options.labels} and {options.submission} have no row_id in common ({next(iter(present))}, for one); name these soundscapes' labels")
    seconds = competitions.competition(options.competition).soundscape_seconds
    soundscapes = find_soundscapes(options.soundscapes, seconds, recursive=options.recursive)[: options.first]
    n_drawn = 0
    for soundscape in progress(soundscapes, what="drawing", unit="file"):
        ids, seconds = submission.row_ids(soundscape.name, soundscape.n_rows), soundscape.n_rows * submission.ROW_SECONDS
        absent = [row for row in ids if row not in table.index]
        if absent and soundscape.fault:  # its number of rows is a guess
            say(f"{soundscape.path.name}: {soundscape.fault}; not drawn")
            continue
        if absent:
            raise UserError(f"{options.submission} lacks the row {absent[0]} of {soundscape.path}")
        truth = np.array([[label in present.get(row, []) for label in classes] for row in ids], float) if present is not None else None
        stream, overview = audio.LogMelStream(config), Overview(config, seconds)
        try:
            for block in audio.read_blocks(soundscape.path, config.sample_rate):
                overview.push(stream.push(block))
            overview.push(stream.finish())
        except audio.DamagedAudio as error:
            say(f"{soundscape.path.name}: {error}")
        plots.timeline(options.out / f"{soundscape.name}.png", overview.image(seconds), table.loc[ids].to_numpy(), classes, config,
                       row_seconds=submission.ROW_SECONDS, heading=soundscape.path.name, truth=truth)
        n_drawn += 1
    say(f"wrote {n_drawn} picture(s) to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
