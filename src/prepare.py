"""A data set as it is published -> the layout that every stage reads: train_metadata.csv, train_audio/, its folds and recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .console import UserError, say, stage
from .sources import SOURCES
from .sources.layout import FILES, write
from .sources.ucr import name_of
from .storage import owned, write_text

MARK = "prepared_from.txt"  # in a prepared folder: the data set's name


def claim(out: Path, name: str) -> None:
    """Marks the folder as this data set's. Raises UserError where it holds files of a data set that were not prepared from it."""
    try:
        if (out / MARK).read_text(encoding="utf-8").strip() == name:
            return
    except (OSError, UnicodeDecodeError):
        pass
    taken = [each for each in FILES if (out / each).exists()]
    if taken:
        raise UserError(f"{out / taken[0]} is there already, and not from {name}; name another --out, or move what lies there away")
    write_text(out / MARK, name + "\n")


@stage
def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m src.prepare", description=__doc__)
    options.add_argument("name", choices=list(SOURCES), metavar="NAME", help=", ".join(SOURCES))
    options.add_argument("source", type=Path, metavar="SOURCE", help="folder of the data set as it was downloaded and unpacked")
    options.add_argument("--out", type=Path, help="(default: input/<NAME>)")
    options = options.parse_args(argv)
    out = options.out or Path("input") / options.name
    if not options.source.is_dir():
        raise UserError(f"{options.source} is no folder; unpack the data set first")
    if out.resolve() == options.source.resolve():
        raise UserError(f"{out} is the source itself; name another --out")
    with owned(out):
        claim(out, name_of(options.source) if options.name == "ucr" else options.name)
        data = SOURCES[options.name](options.source, out)
        missing = write(data, out)
    if missing:
        say(f"{len(missing)} of {len(data.recordings)} recordings are not there, listed in {out / 'missing_audio.csv'}; the cache will leave them out")
    for file, settings in (("cache.yaml", data.cache), ("train.yaml", data.train)):
        if settings and (out / file).exists():
            say(f"src.{file.removesuffix('.yaml')} will take from {out / file}: {', '.join(f'{key} {value}' for key, value in settings.items())}")
    split = f"its folds are {' and '.join(str(out / file) for file in data.folds)}" if data.folds else \
        f"next: python -m src.folds --data {out}"
    say(f"wrote {out}: {len(data.recordings)} recordings of {data.recordings.primary_label.nunique()} classes; {split}")


if __name__ == "__main__":
    sys.exit(main())
