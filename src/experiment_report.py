"""experiments.csv -> a table's Markdown, CSV and picture: means with intervals, paired differences, costs, the paper's own figures beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

from . import plots
from .experiment_results import FLOATS, SPEED, Results, read_table, unpacked
from .metrics import NAMES, bootstrap_weights
from .paper_tables import BUDGETS, Budget, Row, Table
from .storage import write_table, write_text

NONE = "–"
RESAMPLES = 1000
UNKNOWN = (np.nan,) * 3
SHOWN = ("top1", "macro_ap")  # the other metrics are in the CSV


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean and the bounds of its 95 % interval by Student's t; the bounds are NaN for fewer than two values."""
    if not len(values):
        return np.nan, np.nan, np.nan
    mean = float(values.mean())
    if len(values) < 2:
        return mean, np.nan, np.nan
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def interval_of_whole_seeds(values: pd.Series, n_folds: int) -> tuple[float, float, float]:
    """The same of values by (seed, fold), over the folds, each the mean of its seeds: seeds share a fold's recordings and are no further draws.
    Without bounds while a seed lacks folds, and for fewer than three folds, which may agree by chance."""
    values = values.dropna().astype(float)
    _, *bounds = interval(values.groupby("fold").mean().to_numpy())
    whole = n_folds > 2 and values.groupby("seed").size().eq(n_folds).all()
    return float(values.mean()), *(bounds if whole else (np.nan, np.nan))


def shown(estimate: Sequence[float], sign: str = "") -> str:
    mean, low, high = estimate
    if np.isnan(mean):
        return NONE
    return f"{mean:{sign}.3f}" + ("" if np.isnan(low) else f" ({low:{sign}.3f} to {high:{sign}.3f})")


def bootstrap(values: Sequence[np.ndarray], cells: pd.MultiIndex) -> tuple[float, float, float]:
    """Mean and 95 % interval over recordings; values: one a recording for each training (seed, fold)."""
    folds: dict[int, list[np.ndarray]] = {}
    for (_, fold), of_training in zip(cells, values):
        folds.setdefault(fold, []).append(of_training)
    if not folds:
        return UNKNOWN
    mean = np.concatenate([np.mean(of_fold, axis=0) for of_fold in folds.values()])  # (recordings,)
    means = mean @ bootstrap_weights(len(mean), RESAMPLES) / len(mean)
    return float(means[0]), *np.percentile(means[1:], [2.5, 97.5]).tolist()


class DataTable:
    """One data set's rows of a table."""

    def __init__(self, table: Table, budget: Budget, data: str, results: Results, noisy: Collection[str], speeds: pd.DataFrame,
                 folds: Sequence[int] = ()) -> None:
        named: dict[str, Row] = {}
        for row in table.of(data):
            named.setdefault(row.key(data, noisy), row)  # noise on or off is the same row where there is none
        self.data, self.rows = data, list(named.values())
        self.folds = sorted(folds or set(results.table.fold[results.table.data == data]))[: budget.n_folds or None]  # without the data: those met so far
        cells = [(seed, fold) for seed in budget.seeds for fold in self.folds]
        self.found = {row.name: (of := results.of(data, row.key(data, noisy)))[of.index.isin(cells)] for row in self.rows}
        self.n_cells, self.seeds = len(cells), budget.seeds
        self.speeds = speeds.set_index("network").windows_per_second

    def estimate(self, row: Row, metric: str) -> tuple[float, float, float]:
        mean, *bounds = interval_of_whole_seeds(self.found[row.name][metric], len(self.folds))
        return mean, *np.clip(bounds, 0, 1).tolist()

    def difference(self, row: Row, metric: str) -> tuple[float, float, float]:
        """This row minus the one it is compared with, over the folds and seeds that both have."""
        if row.against == row.name or row.against not in self.found:
            return interval(np.empty(0))
        pair = self.found[row.name][metric].astype(float) - self.found[row.against][metric].astype(float)
        return interval_of_whole_seeds(pair, len(self.folds))

    def unlike_pairs(self, row: Row) -> tuple[int, int]:
        """How many of the trainings that a difference pairs were trained on unlike devices; and how many pairs there are."""
        if row.against == row.name or row.against not in self.found:
            return 0, 0
        pairs = self.found[row.name][["device"]].merge(self.found[row.against][["device"]], left_index=True, right_index=True, suffixes=("", "_base"))
        return int((pairs.device != pairs.device_base).sum()), len(pairs)

    def over_recordings(self, row: Row) -> tuple[float, float, float]:
        """Top-1 of all folds' held-out recordings, each one's mean over the seeds, with its 95 % bootstrap interval over the recordings."""
        return bootstrap([unpacked(one.hits, one.held_out) for one in self.found[row.name].itertuples()], self.found[row.name].index)

    def difference_over_recordings(self, row: Row) -> tuple[float, float, float]:
        """The same of this row's top-1 minus that of the one it is compared with, recording by recording, over the trainings that both have."""
        if row.against == row.name or row.against not in self.found:
            return UNKNOWN
        both = self.found[row.name].merge(self.found[row.against], left_index=True, right_index=True, suffixes=("", "_base"))
        return bootstrap([unpacked(one.hits, one.held_out) - unpacked(one.hits_base, one.held_out) for one in both.itertuples()], both.index)

    def cost(self, row: Row) -> dict[str, float]:
        found = self.found[row.name]
        costs = {name: float(found[name].mean()) if len(found) else np.nan for name in ("parameters", "gmacs", "train_seconds")}
        return costs | {"windows_per_second": float(self.speeds.get(row.network(), np.nan))}

    def markdown(self, paper: dict[str, dict[str, float]]) -> list[str]:
        columns = paper_data(paper)
        compared = ["compared with"] if len({row.against for row in self.rows}) > 1 else []
        by_seed = ["top-1 of each seed"] if len(self.seeds) > 1 else []
        header = ["row", "trainings", *compared, *by_seed, *(f"{NAMES[metric]}{what}" for metric in SHOWN for what in ("", ", difference")),
                  "top-1 over recordings", "difference over recordings", "parameters, M", "GMACs",
                  "training, s a fold", "CPU windows/s", *([f"paper, mAP %: {' / '.join(columns)}"] if paper else [])]
        lines = ["", f"## {self.data}", "", *("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header)))]
        devices = {device for found in self.found.values() for device in found.device}
        for row in self.rows:
            cost, n = self.cost(row), len(self.found[row.name])
            scores = [cell for metric in SHOWN for cell in (shown(self.estimate(row, metric)), shown(self.difference(row, metric), "+"))]
            scores += [shown(self.over_recordings(row)), shown(self.difference_over_recordings(row), "+")]
            costs = [NONE if np.isnan(value) else f"{value:{form}}" for value, form in (
                (cost["parameters"] / 1e6, ".2f"), (cost["gmacs"], ".2f"), (cost["train_seconds"], ".0f"), (cost["windows_per_second"], ".1f"))]
            if len(devices) > 1 and n:  # seconds on different devices are no comparison unless the device is named, and their mean is nothing
                costs[2] = f"{costs[2]} ({', '.join(set(self.found[row.name].device))})" if self.found[row.name].device.nunique() == 1 else NONE
            figures = [" / ".join(str(paper.get(row.name, {}).get(column, NONE)) for column in columns)] if paper else []
            base = [NONE if row.against == row.name else row.against for _ in compared]
            base += [", ".join(f"{mean:.3f}" for mean in self.found[row.name].top1.astype(float).groupby("seed").mean()) or NONE for _ in by_seed]
            lines.append("| " + " | ".join([row.name, str(n) if n == self.n_cells else f"{n} of {self.n_cells}", *base, *scores, *costs, *figures]) + " |")
        return lines

    def long(self, paper: dict[str, dict[str, float]]) -> list[dict]:
        return [{"data": self.data, "row": row.name, "metric": metric, "trainings": len(self.found[row.name]),
                 **dict(zip(("mean", "low", "high"), self.estimate(row, metric))), "compared_with": row.against if row.against != row.name else "",
                 **dict(zip(("difference", "difference_low", "difference_high"), self.difference(row, metric))),
                 **dict(zip(("over_recordings", "over_recordings_low", "over_recordings_high"), self.over_recordings(row) if metric == "top1" else UNKNOWN)),
                 **dict(zip(("over_recordings_difference", "over_recordings_difference_low", "over_recordings_difference_high"),
                            self.difference_over_recordings(row) if metric == "top1" else UNKNOWN)), **self.cost(row),
                 **{f"paper, {data}, mAP %": paper.get(row.name, {}).get(data, np.nan) for data in paper_data(paper)}}
                for row in self.rows for metric in NAMES]


def write_report(table: Table, budget: Budget, names: Sequence[str], results: Results, noisy: Collection[str], folder: Path, *,
                 folds: Mapping[str, Sequence[int]] = {}) -> bool:
    """Writes <folder>/<table>.md, .csv and .png from what experiments.csv holds; what is not trained yet is a dash. False: nothing of it is.

    `folds`: of each data set, where that is at hand; else those that experiments.csv holds.
    """
    stem = stem_of(table, budget)
    speeds = read_table(folder / "experiments_speed.csv", SPEED)
    parts = [DataTable(table, budget, data, results, noisy, speeds, folds.get(data, ())) for data in names]
    if not any(len(found) for part in parts for found in part.found.values()):
        return False
    write_table(folder / f"{stem}.csv", pd.DataFrame([row for part in parts for row in part.long(table.paper)]), FLOATS)
    draw(folder / f"{stem}.png", table, parts, f"{table.title}\n{in_words(budget)}")
    bases = sorted({row.against for row in table.rows})
    base = bases[0] if len(bases) == 1 else "the one that it is compared with"
    beside = any((found.jobs > 1).any() for part in parts for found in part.found.values())
    ascas = {model for row in table.rows if (model := row.settings().model).startswith("asca_")}
    lines = [f"# {table.title} ({in_words(budget)})", "", f"`{command(table, budget, names, noisy)}`. {setting(parts, budget, speeds)}", "", table.note, "",
             "Top-1 and macro AP of the held-out recordings (a recording's probability is the mean over its windows): the mean over folds and seeds, and where "
             "no seed lacks a fold and there are three folds or more, the 95 % interval of Student's t over the folds, each the mean of its seeds. Folds "
             "share training recordings, so these intervals are rather too narrow. Over recordings: top-1 again, its 95 % interval a bootstrap over the "
             "held-out recordings of all folds, which leaves out what another training would change; both leave out another species' recordings, and the "
             "first, since folds share a seed's initial weights, a part of what another seed would change. "
             f"Difference: the row minus {base}, paired by fold and seed. Padded cmAP, LRAP and ROC-AUC are in [{stem}.csv]({stem}.csv)."
             + (f" ASCA is `{ascas.pop()}`." if len(ascas) == 1 else "")
             + (" Training seconds are those that passed, beside a changing number of other trainings: they tell no two rows apart." if beside else "")]
    if table.paper:
        lines += ["", "The paper's figures (its table of the same number, mAP) are for other data, sizes and a test set of its own: they show its ranking, "
                  "not what these runs should reach."]
    for part in parts:
        lines += part.markdown(table.paper)
    write_text(folder / f"{stem}.md", "\n".join([*lines, "", f"![{table.title}]({stem}.png)", ""]))
    return True


def stem_of(table: Table, budget: Budget) -> str:
    """The files' name: a small table does not take a full one's place."""
    return table.name if budget.name == "full" else f"{table.name}_{budget.name}"


def in_words(budget: Budget) -> str:
    """What every training of the budget is."""
    return (f"{budget.name} budget: {'each smallest variant, ' if budget.name == 'small' else ''}{budget.side} x {budget.side}, "
            f"{counted(budget.epochs, 'epoch')} in batches of {budget.batch}, {counted(budget.n_folds, 'fold') if budget.n_folds else 'all folds'}, "
            f"{counted(len(budget.seeds), 'seed')}")


def counted(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def paper_data(paper: dict[str, dict[str, float]]) -> list[str]:
    """The data sets of the paper's figures."""
    return list(dict.fromkeys(name for figures in paper.values() for name in figures))


def command(table: Table, budget: Budget, names: Sequence[str], noisy: Collection[str]) -> str:
    """What trains the table, the data lying where README puts them."""
    usual, words = BUDGETS[budget.name], ["python -m src.experiments", table.name, "--budget", budget.name]
    for flag, own, default in (("--seeds", budget.seeds, usual.seeds), ("--epochs", budget.epochs, usual.epochs), ("--input-side", budget.side, usual.side),
                               ("--n-folds", budget.n_folds, usual.n_folds), ("--asca", budget.models[-1], usual.models[-1])):
        if own != default:
            words += [flag, *map(str, own if isinstance(own, tuple) else [own])]
    words += ["--data", *(f"input/{name}" for name in names)]
    if noise := [f"{name}=input/noise" for name in names if name in noisy]:
        words += ["--noise", *noise]
    return " ".join(words)


def setting(parts: Sequence[DataTable], budget: Budget, speeds: pd.DataFrame) -> str:
    """One sentence or two: folds, seeds, where it was trained and measured."""
    found = pd.concat([table for part in parts for table in part.found.values()])
    folds = "; ".join(f"{part.data}: {len(part.folds)} folds" for part in parts)
    devices = sorted(f"{device} ({jobs} trainings side by side)" for device, jobs in set(zip(found.device, found.jobs)))
    mixed = [f"{row.name} on {part.data}" for part in parts for row in part.rows if part.found[row.name].device.nunique() > 1]
    unlike = [f"{row.name} on {part.data} ({n} of {n_pairs})" for part in parts for row in part.rows for n, n_pairs in [part.unlike_pairs(row)] if n]
    networks = {row.network() for part in parts for row in part.rows}
    cpus = sorted({f"{device}, {threads} threads" for network, _, threads, device in speeds.itertuples(index=False) if network in networks})
    return (f"From scratch but where a row says otherwise; {folds}; seed{'s' if len(budget.seeds) > 1 else ''} {', '.join(map(str, budget.seeds))}. "
            f"Trained on {', '.join(devices)} at commit {', '.join(sorted(set(found.commit)))}."
            + (f" CPUs train in float32, GPUs in bfloat16, and partly on each: {', '.join(mixed)}." if mixed else "")
            + (f" Compared with trainings on another device: {', '.join(unlike)}." if unlike else "")
            + (f" CPU windows a second: exported with 264 classes, onnxruntime float32, {'; '.join(cpus)}." if cpus else ""))


def draw(path: Path, table: Table, parts: Sequence[DataTable], heading: str) -> None:
    if table.x:
        plots.lines(path, [(f"{part.data}: {NAMES[metric]}", curves(part, metric)) for part in parts for metric in SHOWN], table.x, heading)
        return
    rows = [row for row in table.rows if any(len(part.found.get(row.name, ())) for part in parts)]
    panels = [(f"{part.data}: {NAMES[metric]}", [(row.name, *of_picture(part, row, metric)) for row in rows]) for part in parts for metric in SHOWN]
    panels += [(f"the paper: {data}, mAP %", [(row.name, (table.paper.get(row.name, {}).get(data, np.nan), np.nan, np.nan), ()) for row in rows])
               for data in paper_data(table.paper)]
    plots.intervals(path, panels, heading, reference=rows[0].against,
                    foot="small: each training; hollow: a mean that lacks trainings; bars: 95 % intervals of the mean, where no seed lacks a fold")


def curves(part: DataTable, metric: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """line -> (x, mean, low, high) of its rows."""
    found: dict[str, list] = {}
    for row in part.rows:
        if len(part.found[row.name]):
            found.setdefault(row.line, []).append((row.x, *part.estimate(row, metric)))
    return found


def of_picture(part: DataTable, row: Row, metric: str) -> tuple[tuple[float, float, float], Sequence[float]]:
    """((mean, low, high), each training's value)."""
    return (part.estimate(row, metric), part.found[row.name][metric].tolist()) if row in part.rows else (UNKNOWN, ())
