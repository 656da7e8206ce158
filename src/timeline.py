"""A submission + its soundscapes -> one picture each: spectrogram, probabilities over time and, where given, the truth."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

from . import audio, plots, submission
from .config import AudioConfig
from .console import UserError, progress, say, stage
from .infer import find_soundscapes
from .metadata import read_csv

SHOWN_SECONDS = 600.0  # a longer soundscape shows its first ten minutes


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
    options.add_argument("--labels", type=Path, help="CSV of row_id and labels, drawn as outlines")
    options.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    options.add_argument("--first", type=int, metavar="N", help="draw only the first N soundscapes")
    options = options.parse_args(argv)
    table, config = read_csv(options.submission).set_index("row_id"), AudioConfig()
    classes = table.columns.tolist()
    soundscapes = find_soundscapes(options.soundscapes, SHOWN_SECONDS)[: options.first]
    for soundscape in progress(soundscapes, what="drawing", unit="file"):
        n = min(soundscape.n_rows, round(SHOWN_SECONDS / submission.ROW_SECONDS))
        ids = submission.row_ids(soundscape.path.stem, n)
        absent = [row for row in ids if row not in table.index]
        if absent:
            raise UserError(f"{options.submission} lacks the row {absent[0]} of {soundscape.path}")
        stream, frames = audio.LogMelStream(config), []
        try:
            for block in audio.read_blocks(soundscape.path, config.sample_rate):
                frames.append(stream.push(block))
                if sum(part.shape[1] for part in frames) >= SHOWN_SECONDS * config.frames_per_second:
                    break
        except audio.DamagedAudio as error:
            say(f"{soundscape.path.name}: {error}")
        if not frames:
            continue
        n_frames = round(n * submission.ROW_SECONDS * config.frames_per_second)
        log_mel = np.concatenate([*frames, stream.finish()], axis=1)[:, :n_frames]
        log_mel = np.pad(log_mel, ((0, 0), (0, n_frames - log_mel.shape[1])), constant_values=config.db_min)
        plots.timeline(options.out / f"{soundscape.path.stem}.png", log_mel, table.loc[ids].astype(float).to_numpy(), classes, config,
                       row_seconds=submission.ROW_SECONDS, heading=soundscape.path.name,
                       truth=truth_matrix(options.labels, ids, classes) if options.labels else None)
    say(f"wrote {len(soundscapes)} picture(s) to {options.out}")


if __name__ == "__main__":
    sys.exit(main())
