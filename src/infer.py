"""STAGE 6: soundscapes + models -> submission.csv, and detections for people. On a CPU, without torch."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from . import audio, competitions, detections, engines, species, submission
from .console import UserError, say, stage, usable_cores
from .deadline import Guard
from .onnx_models import OnnxModel, find_models
from .scoring import TIME_WAS_UP, Ensemble, score
from .soundscapes import Soundscape, beside, find_soundscapes
from .storage import owned_file, safe_cell, sha256, write_table

MARGIN_SECONDS, MARGIN_SHARE = 5.0, 0.02  # of the time limit kept free, beside twice what the last write and its validation take


def choose_columns(models: list[OnnxModel], sample: Path | None, soundscapes: Path) -> tuple[str, ...]:
    """The sample submission's species in its order, else the models'. Raises UserError where they differ."""
    classes = models[0].classes
    if sample is None:
        sample = next(iter(beside(soundscapes, "sample_submission.csv")), None)
        if sample is None:
            return classes
    columns = submission.columns_of_sample(sample)
    missing, extra = sorted(set(columns) - set(classes)), sorted(set(classes) - set(columns))
    if missing or extra:
        raise UserError(f"{sample} and the models differ in species: only in the sample {missing[:5]} ({len(missing)}), only in the models "
                        f"{extra[:5]} ({len(extra)}); name the right file with --sample")
    return columns


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m src.infer", description=__doc__)
    add = options.add_argument
    add("--run", type=Path, nargs="+", default=[Path("runs/asca")], help="runs whose folds are averaged, the best first (default: runs/asca)")
    add("--competition", metavar="NAME", help=f"{', '.join(competitions.COMPETITIONS)}: sets the soundscapes' folder, --expected-seconds and "
        f"--time-limit (default: {competitions.DEFAULT}'s, without its time limit)")
    add("--soundscapes", type=Path, help="folder of long recordings (default: input/<competition>/test_soundscapes)")
    add("--recursive", action="store_true", help="also its sub-folders; row ids and tables are then named by the path below the folder")
    add("--out", type=Path, default=Path("submissions/asca.csv"), help="the submission: priors at first, replaced as rows come (default: "
        "submissions/asca.csv)")
    add("--sample", type=Path, help="sample submission that gives the columns (default: the one beside the soundscapes' folder)")
    add("--hop-seconds", type=float, default=submission.ROW_SECONDS, help="between windows; under 5 they overlap (default: 5, or the window if shorter)")
    add("--pooling", choices=submission.POOLINGS, default="mean", help="of the windows that overlap a row: their mean, weighted by the overlap, or of those "
        "that lie mostly in it the maximum (default: mean)")
    add("--expected-seconds", type=float, help="length of a file whose header is unreadable (default: the competition's)")
    add("--batch-size", type=int, default=0, help="windows handed to the model at once; 0: two a thread, at least 8 (default: 0)")
    add("--threads", type=int, default=0, help="of the model; 0: all cores that the process may use (default: 0)")
    add("--engine", choices=engines.ENGINES, default="auto", help="auto: onnxruntime for f32, OpenVINO for bf16 and int8 (default: auto)")
    add("--precision", choices=engines.PRECISIONS, default="f32", help="bf16, int8: OpenVINO's, once src.precision accepted them (default: f32)")
    add("--check", type=Path, metavar="FILE", help="only validate a submission (with --soundscapes also its rows, with --sample its columns)")
    limit = options.add_argument_group("deadline", "What does not fit is dropped: overlap of windows, then models from the last to the second, then the "
                                       "soundscapes that are left keep the prior.")
    limit.add_argument("--time-limit", type=float, metavar="MINUTES", help="0: none (default: none, or --competition's)")
    limit.add_argument("--started", type=float, metavar="EPOCH_SECONDS", help="when the time began to run, as `date +%%s` says (default: now)")
    people = options.add_argument_group("for field ecologists").add_argument
    people("--format", nargs="+", default=["submission"], metavar="FORMAT", help=f"of submission, {', '.join(detections.SUFFIXES)}; several: commas or spaces")
    people("--tables", type=Path, metavar="DIR", help="folder of the tables, continued when interrupted (default: --out without its suffix, or with _tables "
           "where it has none)")
    people("--threshold", type=float, default=0.5, help="probability from which a species counts as detected (default: 0.5)")
    people("--thresholds", type=Path, metavar="FILE", help="CSV of primary_label and threshold; others have --threshold")
    people("--species", type=Path, metavar="FILE", help="only these are detected: one code, scientific or common name a line")
    people("--taxonomy", type=Path, metavar="FILE", help="names: eBird's or BirdCLEF's taxonomy (default: one beside the soundscapes' folder)")
    people("--pictures", type=Path, metavar="DIR", help="a picture per recording: spectrogram and probabilities over time")
    people("--restart", action="store_true", help="begin the tables anew")
    return options


def check_options(options: argparse.Namespace) -> None:
    """Fills in what depends on other options. Raises UserError."""
    year = competitions.competition(options.competition or competitions.DEFAULT)
    if options.soundscapes is None and not options.check:
        options.soundscapes = Path("input") / (options.competition or competitions.DEFAULT) / "test_soundscapes"
    options.expected_seconds = year.soundscape_seconds if options.expected_seconds is None else options.expected_seconds
    if options.time_limit is None:
        options.time_limit = year.cpu_minutes if options.competition else 0.0
    options.started = time.time() if options.started is None else options.started
    options.format = [name for word in options.format for name in word.replace(",", " ").split()]
    unknown = sorted(set(options.format) - {"submission", *detections.SUFFIXES})
    if unknown or not options.format:
        raise UserError(f"--format {' '.join(unknown)} is not known; known are submission, {', '.join(detections.SUFFIXES)}")
    for_people = {f"--{name}": getattr(options, name) for name in ("tables", "thresholds", "species", "taxonomy", "restart")}
    for_people["--threshold"] = options.threshold != parser().get_default("threshold")
    options.tables = options.tables or (options.out.with_suffix("") if options.out.suffix else options.out.parent / f"{options.out.name}_tables")
    if options.out.is_dir() and "submission" in options.format and not options.check:
        raise UserError(f"--out {options.out} is a folder; name the file to write, {options.out / 'asca.csv'} for one")
    if not 0 < options.hop_seconds <= submission.ROW_SECONDS or min(options.batch_size, options.threads) < 0 or not 0 < options.expected_seconds < math.inf:
        raise UserError("--hop-seconds must be within (0, 5], --batch-size and --threads not negative, --expected-seconds positive")
    if not 0 <= options.threshold <= 1 or not 0 <= options.time_limit < math.inf:
        raise UserError("--threshold must be within 0 and 1, --time-limit a number of minutes, or 0 for none")
    if not -math.inf < options.started <= time.time() + 60:
        raise UserError(f"--started {options.started:.0f} lies in the future or is no time; it is seconds since 1970, as `date +%s` prints")
    if not set(options.format) & set(detections.SUFFIXES) and not options.pictures and not options.check and any(for_people.values()):
        raise UserError(f"{next(name for name, given in for_people.items() if given)} is for tables and pictures, and none are asked for: "
                        "add --format raven (or audacity, csv), or --pictures DIR")


@partial(stage, kept="finished tables are kept, {again} continues them; a submission holds the rows that were last written, and is begun anew")
def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    check_options(options)
    if options.check:
        return report(options)
    threads, engine = options.threads or usable_cores(), engines.choose(options.engine, options.precision)
    submission_too = "submission" in options.format  # its rows are all of one run: nothing is continued
    soundscapes = find_soundscapes(options.soundscapes, options.expected_seconds, recursive=options.recursive, to_the_end=not submission_too)
    models = find_models(options.run, threads, engine)
    classes = choose_columns(models, options.sample, options.soundscapes)
    say(f"{len(soundscapes)} soundscapes in {options.soundscapes}, {sum(s.n_rows for s in soundscapes)} rows, {len(classes)} species; "
        f"{len(models)} model(s) on {threads} CPU thread(s), {engine}")
    if not soundscapes:
        say(f"no audio file ({', '.join(sorted(audio.SUFFIXES))}) in {options.soundscapes}" + ("" if options.recursive else "; --recursive looks below it too"))
    for_people = set(options.format) & set(detections.SUFFIXES) or options.pictures
    with (owned_file(options.out) if submission_too else nullcontext(),
          open_tables(options, models, classes) if for_people else nullcontext() as tables):
        to_do = tables.to_do(soundscapes, again=submission_too) if tables else soundscapes
        if len(to_do) < len(soundscapes):
            say(f"continuing {options.tables}: {len(soundscapes) - len(to_do)} of {len(soundscapes)} recordings are done")
        seconds = options.started + 60 * options.time_limit - time.time() if options.time_limit else None
        guard = Guard(seconds, hop_seconds=options.hop_seconds, full_hop_seconds=submission.ROW_SECONDS, n_models=len(models),
                      n_rows=sum(s.n_rows for s in to_do if not s.fault), window_seconds=[model.audio.window_seconds for model in models])
        ensemble = Ensemble(models, classes, guard, options.pooling)
        guard.reserve = MARGIN_SECONDS + MARGIN_SHARE * max(0.0, guard.left()) if guard.limited else 0.0
        file = begin_submission(options.out, soundscapes, classes, ensemble.prior, guard) if submission_too else None
        try:
            for result in score(to_do, ensemble, batch_size=options.batch_size or max(8, 2 * threads), overviews=bool(options.pictures)):
                soundscape = to_do[result.number]
                if file:
                    file.fill(result.number, result.probability)
                    file.write_if_due()
                if tables and result.complete:
                    tables.add(soundscape, result.probability, result.known)
                soundscape.overview = None
        except Exception:
            if file:
                file.write()  # what was scored ahead of the failure is kept
            raise
        faults = file.write_and_check() if file else []  # first, since all else can be made again
        if tables:
            tabled = tables.finish(soundscapes)
            say(f"wrote {options.tables}: {', '.join(name for name in options.format if name in detections.SUFFIXES) or 'pictures'}")
    failures = options.out.with_name(options.out.stem + "_failures.csv") if file else options.tables / "failures.csv"
    list_failures(failures, soundscapes if file else tabled, "hold the prior" if file else "hold no detection")
    return verdict(f"wrote {options.out}: {sum(s.n_rows for s in soundscapes)} rows x {len(classes)} species, ", faults) if file else 0


def open_tables(options: argparse.Namespace, models: list[OnnxModel], classes: Sequence[str]) -> detections.DetectionTables:
    names = species.read_names(options.taxonomy, options.soundscapes)
    thresholds = species.choose_thresholds(classes, names, threshold=options.threshold, per_species=options.thresholds, species=options.species)
    settings = {"soundscapes": str(options.soundscapes.resolve()), "models": [sha256(model.path) for model in models], "precision": options.precision,
                "hop_seconds": options.hop_seconds, "pooling": options.pooling, "recursive": options.recursive,
                "to_the_end": "submission" not in options.format}
    formats = [name for name in detections.SUFFIXES if name in options.format]
    return detections.DetectionTables(options.tables, options.soundscapes, formats, classes, thresholds, names, config=models[0].audio,
                                      settings=settings, pictures=options.pictures, restart=options.restart)


def list_failures(path: Path, soundscapes: list[Soundscape], fate: str) -> None:
    """Writes the damaged and the unfinished; `fate`: what their missing rows do."""
    failed = [s for s in soundscapes if s.fault]
    if not failed:
        path.unlink(missing_ok=True)
        return
    rows = [[safe_cell(s.name + s.path.suffix), f"{s.seconds_decoded:.2f}", safe_cell(s.fault)] for s in failed]
    write_table(path, pd.DataFrame(rows, columns=["filename", "seconds_decoded", "cause"]))
    late = sum(s.fault.startswith(TIME_WAS_UP) for s in failed)
    if late:
        say(f"{TIME_WAS_UP} before {late} soundscape(s) were scored whole, listed in {path}; their missing rows {fate}")
    if len(failed) > late:
        say(f"{'ALL ' if len(failed) - late == len(soundscapes) else ''}{len(failed) - late} damaged soundscape(s), listed in {path}; "
            f"their missing stretches {fate}")


def begin_submission(path: Path, soundscapes: list[Soundscape], classes: Sequence[str], prior: np.ndarray, guard: Guard) -> submission.SubmissionFile:
    """The priors are written at once and replaced as rows come: what cannot be written fails before hours of scoring, and an interruption
    leaves a whole file. Under a time limit that also measures what the last write and its validation will take."""
    file = submission.SubmissionFile(path, [(s.name, s.n_rows) for s in soundscapes], classes, prior)
    if not guard.limited:
        file.write()
        say(f"{path} holds the prior until rows come")
        return file
    began = guard.clock()
    faults = file.write_and_check()
    guard.reserve += 2 * (guard.clock() - began)
    say(f"wrote {path}, filled with the prior ({'; '.join(faults) or 'valid'}); {guard.left() / 60:.2f} min for scoring")
    return file


def verdict(opening: str, faults: list[str]) -> int:
    """Says whether a submission is valid; 0 where it is."""
    say(f"{opening}{'valid' if not faults else 'NOT VALID'}")
    for fault in faults:
        say(f"  {fault}")
    return int(bool(faults))


def report(options: argparse.Namespace) -> int:
    """--check: the validator's verdict on a file that may come from elsewhere."""
    ids = None
    if options.soundscapes is not None:
        found = find_soundscapes(options.soundscapes, options.expected_seconds, recursive=options.recursive)
        ids = [row for s in found for row in submission.row_ids(s.name, s.n_rows)]
    classes = submission.columns_of_sample(options.sample) if options.sample else None
    return verdict(f"{options.check}: ", submission.check(options.check, classes=classes, ids=ids))


if __name__ == "__main__":
    sys.exit(main())
