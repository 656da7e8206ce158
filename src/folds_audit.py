"""How good a split is: class balance, rare species, copies and shared recordists, as Markdown and PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from . import plots
from .storage import write_text


def _facts(table: pd.DataFrame, folds: np.ndarray, n_folds: int) -> dict[str, str]:
    """Figures of one split; every one is counted on the assignment itself."""
    counts = _per_species(table, folds, n_folds)  # (species, folds), held-out recordings
    total = table.primary_label.value_counts().reindex(counts.index)
    held_out = folds >= 0
    authors = pd.DataFrame({"author": table.author, "fold": folds})[table.author != ""]
    scored = authors[authors.fold >= 0]
    shared, shared_by_folds = (recordist_in_training(known.author, known.fold).sum() / max(1, len(scored))
                               for known in (authors, scored))  # the second leaves aside what is always in training
    known = f" of the {len(scored)} whose recordist is known" if len(scored) < held_out.sum() else ""
    apart = scored.groupby("author").fold.nunique() > 1
    split_copies = pd.Series(folds).groupby(table.copy_group.to_numpy()).nunique() > 1
    frequent = total >= n_folds
    ideal = total.to_numpy()[:, None] / n_folds
    deviation = np.abs(counts.to_numpy() - ideal)[frequent.to_numpy()]
    return {
        "recordings held out, each in one fold": f"{held_out.sum()} of {len(table)}",
        "always in training (fold -1)": f"{(~held_out).sum()} recordings of {table.primary_label[~held_out].nunique()} species",
        "held out per fold": ", ".join(str((folds == fold).sum()) for fold in range(n_folds)),
        f"species of {n_folds}+ recordings that some fold does not hold out": f"{(counts[frequent] == 0).any(axis=1).sum()} of {frequent.sum()}",
        "species missing from some fold's training": str((counts.to_numpy() == total.to_numpy()[:, None]).any(axis=1).sum()),
        "mean distance from an even share, recordings per species and fold": f"{deviation.mean():.2f}" if deviation.size else "-",
        "recordists held out in more than one fold": f"{apart.sum()} of {len(apart)}",
        "held-out recordings whose recordist is also in training": f"{shared:.1%}{known}",
        "the same, leaving aside the recordings that are always in training": f"{shared_by_folds:.1%}{known}",
        "groups of copies on more than one side": str(split_copies.sum()),
    }


def recordist_in_training(author: pd.Series, fold: np.ndarray) -> np.ndarray:
    """(n,) for a held-out recording of a known recordist: whether another of theirs is in training for its fold (-2 never is)."""
    table = pd.DataFrame({"author": author.to_numpy(), "fold": fold, "used": fold != -2})
    theirs, in_the_fold = table.groupby("author").used.transform("sum"), table.groupby(["author", "fold"]).used.transform("sum")
    return ((table.author != "") & (table.fold >= 0) & (theirs > in_the_fold)).to_numpy()


def _per_species(table: pd.DataFrame, folds: np.ndarray, n_folds: int) -> pd.DataFrame:
    counts = pd.crosstab(table.primary_label, folds)
    return counts.reindex(columns=range(n_folds), fill_value=0)


def write_audit(
    table: pd.DataFrame, by_strategy: dict[str, np.ndarray], *, chosen: str, n_folds: int, out: Path
) -> tuple[Path, Path]:
    """Writes <out>.audit.md and <out>.audit.png and returns their paths."""
    facts = pd.DataFrame({name: _facts(table, folds, n_folds) for name, folds in by_strategy.items()})
    counts = table.primary_label.value_counts()
    rare = counts[counts < n_folds]
    sizes = table.groupby("copy_group").size()
    lines = [
        f"# Folds of {out.name}",
        "",
        f"{len(table)} recordings of {len(counts)} species in {n_folds} folds; the table holds the strategy **{chosen}**.",
        "",
        "| | " + " | ".join(facts.columns) + " |",
        "|---|" + "---|" * len(facts.columns),
        *(f"| {name} | " + " | ".join(row) + " |" for name, row in zip(facts.index, facts.to_numpy())),
        "",
        f"**Copies.** {sizes[sizes > 1].sum()} recordings are copies of one another, in {(sizes > 1).sum()} groups (same id, or same "
        "recordist, species and duration). "
        + ("Durations were known." if table.duration_s.notna().all() else
           f"The duration of {table.duration_s.isna().sum()} recordings was not known: for these only the id was compared."),
        "",
        f"**Rare species.** {len(rare)} species have fewer than {n_folds} recordings and are always in training: "
        "no fold can score them all. " + ", ".join(f"{label} ({n})" for label, n in rare.items()),
        "",
        f"![class balance]({out.stem}.audit.png)",
        "",
    ]
    markdown, picture = out.with_name(out.stem + ".audit.md"), out.with_name(out.stem + ".audit.png")
    write_text(markdown, "\n".join(lines))
    _draw(table, by_strategy, n_folds, picture)
    return markdown, picture


def _draw(table: pd.DataFrame, by_strategy: dict[str, np.ndarray], n_folds: int, picture: Path) -> None:
    figure = Figure(figsize=(6 * len(by_strategy), 8), layout="constrained")
    axes = figure.subplots(2, len(by_strategy), squeeze=False)
    order = table.primary_label.value_counts().index
    for (name, folds), (top, bottom) in zip(by_strategy.items(), axes.T):
        counts = _per_species(table, folds, n_folds).reindex(order)
        share = counts.div(counts.sum(axis=1).replace(0, np.nan), axis=0)
        image = top.imshow(share.T, aspect="auto", cmap="viridis", vmin=0, vmax=2 / n_folds, interpolation="nearest")
        top.set(title=f"{name}: each species' share per fold", xlabel="species, frequent to rare (white: always in training)",
                ylabel="fold", yticks=range(n_folds))
        figure.colorbar(image, ax=top, label=f"share of held-out recordings (even: {1 / n_folds:.2f})")
        sizes = pd.Series(folds).value_counts().reindex([-1, *range(n_folds)], fill_value=0)
        bars = bottom.bar([str(fold) for fold in sizes.index], sizes, color=["0.7"] + ["C0"] * n_folds)
        bottom.bar_label(bars)
        bottom.margins(y=0.08)  # room for the figures
        bottom.set(title=f"{name}: recordings held out", xlabel="fold (-1: always in training)", ylabel="recordings")
    plots.save(figure, picture, dpi=110)
