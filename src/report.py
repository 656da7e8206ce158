"""A run's report.md: what was trained, how it scored and on what it failed, with its pictures beside it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import metrics, mistakes, plots
from .cache import Cache
from .metadata import Metadata
from .settings import flatten
from .storage import safe_cell, write_text
from .train_settings import TrainSettings

PAIRS, LISTED, DRAWN, RANKED = 15, 20, 6, 10  # confused pairs, worst mistakes, those with spectrograms, best and worst classes
MATRIX_CLASSES = 30  # as many as a confusion matrix can show readably
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
NONE = "–"


@dataclass(frozen=True)
class OutOfFold:
    """A run's pooled out-of-fold predictions and what they belong to."""

    run: Path
    configs: dict[int, dict]  # of the finished folds
    metadata: Metadata
    names: pd.Series  # (n,) filenames
    fold: np.ndarray  # (n,)
    truth: np.ndarray  # (n, C) of 0/1
    probability: np.ndarray  # (n, C)
    cache: Cache | None
    why_no_cache: str

    @property
    def primary(self) -> np.ndarray:
        """(n,) the column of each recording's primary label."""
        label = self.metadata.table.set_index("filename").primary_label
        return pd.Index(self.metadata.classes).get_indexer(label.loc[self.names])


def write_report(oof: OutOfFold, columns: dict[str, dict[str, Any]], per_class: pd.DataFrame) -> list[str]:
    """Writes report.md and its pictures into the run's folder; the pictures' names. columns: heading -> metric -> what stands there."""
    settings = next(iter(oof.configs.values()))["settings"]
    lines = [f"# {text(oof.run.resolve().name)}: out of fold", "",
             f"{text(settings['model'])}, {count(len(oof.configs), 'fold')}, {count(len(oof.names), 'held-out recording')}, "
             f"{count(len(oof.metadata.classes), 'class', 'classes')}. A recording's probability is the mean over its windows, "
             f"and the truth is {truth_is(settings)}.", "", *scores(columns), *what_was_trained(oof, settings), *training(oof),
             *classes(oof, per_class), *calibration(oof), *confusions(oof), *worst(oof)]
    report = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"
    write_text(oof.run / "report.md", report)
    return re.findall(r"^!\[.*\]\((.*)\)$", report, re.M)


def text(value: Any) -> str:
    """A value in Markdown, in a table or out of it: nothing in a text is markup, nothing runs in a spreadsheet; numbers stay."""
    if isinstance(value, (list, tuple)):
        return " ".join(map(text, value)) or NONE
    if value is None:
        return NONE
    if not isinstance(value, str):
        return str(value)
    inside = r"(?<=[A-Za-z0-9])_(?=[A-Za-z0-9])"  # an underscore inside a word is no markup
    return re.sub(inside + r"|([\\`*_{}\[\]<>#|~$&!^])", lambda m: "\\" + m[1] if m[1] else "_", safe_cell(" ".join(value.split())))


def three(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else NONE


def table(header: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """A Markdown table of cells that are escaped, between blank lines."""
    return ["", *("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *([text(cell) for cell in row] for row in rows))), ""]


def picture(name: str, what: str) -> list[str]:
    return ["", f"![{what}]({name})", ""]


def count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def truth_is(settings: dict) -> str:
    if settings["secondary_labels"] in ("soft", "hard"):
        return "its primary and secondary labels"
    return "its primary label alone (a species named only among the secondary labels counts as absent)"


def scores(columns: dict[str, dict[str, Any]]) -> list[str]:
    rows = [[title, *(str(column[name]) for column in columns.values())] for name, title in metrics.NAMES.items()]
    return ["## Scores", "", "In brackets 95 % intervals: bootstraps over recordings; for the mean over folds, the folds' own taken as "
            "independent, and +- is the standard deviation over folds. The padded cmAP's five rows weigh the more the fewer recordings are scored, "
            "and a macro AP tends to be the higher the fewer they are: compare both at the same number only.", *table(["", *columns], rows)]


def what_was_trained(oof: OutOfFold, settings: dict) -> list[str]:
    """Settings, folds, data, audio recipe and versions."""
    default = flatten(TrainSettings())
    changed = [(key, value, default.get(key, "(no such setting)")) for key, value in settings.items()
               if key not in {"fold", "folds", "cache"} and value != default.get(key)]
    folds = [(fold, *(config.get("recordings", {}).get(part) for part in ("training", "held_out")), config["versions"].get("commit"))
             for fold, config in oof.configs.items()]
    config, data = next(iter(oof.configs.values())), oof.metadata.table
    versions = {key: sorted({str(c["versions"].get(key)) for c in oof.configs.values()}) for key in config["versions"] if key != "commit"}
    damaged = "" if oof.cache is None else f", {data.filename.isin(list(oof.cache.damaged)).sum()} of them damaged and left out"
    return ["## What was trained", "", "Settings that differ from the defaults:", *table(["setting", "here", "default"], changed),
            "<details><summary>All settings</summary>", *table(["setting", "value"], settings.items()), "</details>", "",
            "**Folds**", *table(["fold", "recordings in training", "held out", "commit"], folds),
            f"**Data**: {count(len(data), 'recording')}{damaged}; {data.primary_label.nunique()} of {count(len(oof.metadata.classes), 'class', 'classes')} "
            f"have recordings; from {text(settings['data'])}.", "",
            "**Audio recipe**: " + ", ".join(f"{text(key)} {text(value)}" for key, value in config["audio"].items()) + ".", "",
            "**Versions**: " + ", ".join(f"{text(key)} {text(found)}" for key, found in versions.items()) + ".", ""]


def training(oof: OutOfFold) -> list[str]:
    histories = {fold: pd.read_csv(file) for fold in oof.configs if (file := oof.run / f"fold{fold}/history.csv").exists()}
    if not histories:
        return ["## Training", "", "No fold has a history.csv.", ""]
    plots.curves_of_folds(oof.run / "training.png", histories, f"{oof.run.name}: training, fold by fold")
    return ["## Training", "", "Held out: the first window of each recording. Nothing is selected on it: the last epoch's weights, or their moving average "
            "where it is on, are used.",
            *picture("training.png", "loss and held-out scores over the epochs")]


def classes(oof: OutOfFold, per_class: pd.DataFrame) -> list[str]:
    plots.per_class_chart(oof.run / "per_class.png", per_class, f"{oof.run.name}: out-of-fold average precision per class")
    ranked = per_class.dropna(subset="ap").sort_values("ap", ascending=False, kind="stable")
    unscored = per_class.primary_label[per_class.ap.isna()].tolist()
    parts = [("Best to worst:", ranked)]
    if len(ranked) > 2 * RANKED:
        parts = [(f"The {RANKED} best; per_class.csv holds all:", ranked[:RANKED]), (f"The {RANKED} worst:", ranked[-RANKED:])]
    lines = ["## Classes", *picture("per_class.png", "average precision per class")]
    for title, part in parts:
        rows = [(row.primary_label, row.recordings, row.held_out, three(row.ap), three(row.roc_auc)) for row in part.itertuples()]
        lines += [title, *table(["class", "recordings", "held out", "AP", "ROC-AUC"], rows)]
    if unscored:
        more = f" and {len(unscored) - RANKED} more" if len(unscored) > RANKED else ""
        lines += [f"Without a held-out recording, hence not scored: {', '.join(map(text, unscored[:RANKED]))}{more}.", ""]
    return lines


def calibration(oof: OutOfFold) -> list[str]:
    """Reliability of all probabilities and of each recording's highest, and what a threshold would let through."""
    truth, probability = oof.truth > 0.5, oof.probability
    row, likeliest = np.arange(len(truth)), probability.argmax(axis=1)
    curves = {"every class of every recording": metrics.reliability(truth.ravel(), probability.ravel()),
              "each recording's likeliest class": metrics.reliability(truth[row, likeliest], probability[row, likeliest])}
    plots.reliability_diagram(oof.run / "calibration.png", curves, f"{oof.run.name}: what an out-of-fold probability means")
    errors = "; ".join(f"{name} {curve.error:.3f}" for name, curve in curves.items())
    rows = []
    for threshold in THRESHOLDS:
        reached = probability >= threshold
        hits = (reached & truth).sum()
        rows.append((threshold, int(reached.sum()), three(hits / reached.sum()) if reached.any() else NONE, three(hits / truth.sum())))
    return ["## Calibration", "", f"Expected calibration error (0: of what is given a probability of 0.7, 70 % are there): {errors}. "
            "The first is small where most classes are rightly near 0, whatever the rest: read the curve. "
            "Probabilities are of whole recordings: choose a threshold for a soundscape's windows on soundscapes.",
            *picture("calibration.png", "reliability diagram"),
            *table(["threshold", "detections", "share of them right", "share of what is there found"], rows)]


def confusions(oof: OutOfFold) -> list[str]:
    names, primary = oof.metadata.classes, oof.primary
    matrix = mistakes.confusion(primary, mistakes.taken_for(oof.truth, oof.probability, primary), len(names))
    pairs, shown = mistakes.confused_pairs(matrix, names), mistakes.shown_classes(matrix, MATRIX_CLASSES)
    part = "" if matrix.sum() == matrix[np.ix_(shown, shown)].sum() else f", the {len(shown)} classes of the most confused pairs"
    plots.confusion_matrix(oof.run / "confusions.png", matrix, shown, names, f"{oof.run.name}: out of fold{part}")
    lines = ["## Confused pairs", "", f"Taken for a class that is not theirs: {int(pairs.recordings.sum()):,} of {count(len(primary), 'recording')}.",
             *picture("confusions.png", "confusion matrix")]
    if len(pairs):
        rows = [(pair.primary_label, pair.taken_for, pair.recordings, pair.held_out, f"{pair.share:.0%}") for pair in pairs[:PAIRS].itertuples()]
        lines += [f"The {len(rows)} most frequent of {count(len(pairs), 'pair')}:",
                  *table(["class", "taken for", "recordings", "of held out", "share"], rows)]
    return lines


def worst(oof: OutOfFold) -> list[str]:
    (oof.run / "mistakes.png").unlink(missing_ok=True)  # an earlier evaluation's
    names = oof.metadata.classes
    listed = mistakes.worst_mistakes(oof.names, oof.truth, oof.probability, oof.primary)[:LISTED]
    if listed.empty:
        return ["## Worst mistakes", "", "None: the likeliest class of every recording is one of its own."]
    windows = {} if oof.cache is None else {name: mistakes.loudest_window(oof.cache, name) for name in listed.filename if name in oof.cache}
    folds = dict(zip(oof.names, oof.fold))
    rows = [(m.filename, folds[m.filename], names[m.true], f"{m.p_true:.2g}", names[m.wrong], f"{m.p_wrong:.2g}",
             f"{windows[m.filename][1]:.1f}" if m.filename in windows else None) for m in listed.itertuples()]
    lines = ["## Worst mistakes", "", "Recordings whose own class got the lowest probability in proportion to the best wrong one; "
             "listen to them: one may be mislabelled, or hold another species in front.",
             *table(["recording", "fold", "class", "probability", "taken for", "probability", "loudest window from (s)"], rows)]
    drawn = listed[listed.filename.isin(list(windows))].drop_duplicates(["true", "wrong"])[:DRAWN]
    if drawn.empty:
        return [*lines, f"No spectrograms: {text(oof.why_no_cache or 'the cache holds none of these recordings')}.", ""]
    draw_mistakes(oof, drawn, windows)
    return [*lines, "The loudest window of the worst of each pair, beside a recording of the class it was taken for, recognised "
            "with the median probability:", *picture("mistakes.png", "spectrograms of the worst mistakes")]


def draw_mistakes(oof: OutOfFold, drawn: pd.DataFrame, windows: dict[str, tuple[np.ndarray, float]]) -> None:
    taken, pairs = mistakes.taken_for(oof.truth, oof.probability, oof.primary), []
    for m in drawn.itertuples():
        own, wrong = (plots.plain(oof.metadata.classes[column], 24) for column in (m.true, m.wrong))
        log_mel, start = windows[m.filename]
        left = log_mel, f"{plots.plain(m.filename, 40)} from {start:.1f} s\n{own} {m.p_true:.2g}, taken for {wrong} {m.p_wrong:.2g}"
        right = None, f"no held-out recording of {wrong} was recognised"
        row = mistakes.typical(m.wrong, oof.names, taken, oof.probability, oof.primary, oof.cache)
        if row is not None:
            log_mel, start = mistakes.loudest_window(oof.cache, oof.names.iloc[row])
            right = log_mel, f"{plots.plain(oof.names.iloc[row], 40)} from {start:.1f} s\n{wrong} as recognised: {oof.probability[row, m.wrong]:.2g}"
        pairs.append((left, right))
    plots.spectrogram_pairs(oof.run / "mistakes.png", pairs, oof.cache.config,
                            f"{oof.run.name}: worst mistakes (left) beside a recognised recording of what they were taken for (right)")
