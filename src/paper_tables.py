"""The paper's tables and figures as trainings: which rows each has, with which flags of src.train, and what the paper reports.

The paper's figures are from Li et al., "ASCA: Less Audio Data Is More Insightful", tables 1 and 2 (mAP in percent); its figures 2 and 3 give no
numbers. It trained on other data (the full BirdCLEF 2023, AudioSet's balanced part, UCR, VGG-Sound), so they stand beside ours, never against them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from .console import UserError
from .models import ModelSettings
from .models.asca import AscaSettings
from .run_config import ELSEWHERE
from .settings import flatten, parse
from .train_settings import TrainSettings

PAPER_YAML = str(Path(__file__).parent / "recipes" / "paper.yaml")
# What the default recipe had when the committed rows were trained. Batch norm in the attention, ahead in section 4.2's table, and the
# cheaper GELU became the default after that.
THEN = "layer norm in its attention and the exact GELU, the default when this was trained"
AS_TRAINED = ("--attn-norm", "ln", "--activation", "gelu")
SHARES = (0.1, 0.25, 0.5, 1.0)
PATCHES = (7, 14, 16, 32)
# name, flags that leave it out, and the setting that must differ from `off` for it to be on at all
AUGMENTATIONS = (("mixup", "mixup_probability", 0.0), ("SpecAugment", "spec_augment_probability", 0.0), ("random gain", "gain_db", 0.0),
                 ("random filters", "filter_db", 0.0), ("time roll", "roll_probability", 0.0), ("stretch", "stretch", 0.0), ("mel shift", "mel_shift_bins", 0),
                 ("band filters", "band_filter_probability", 0.0), ("white noise", "gaussian_probability", 0.0), ("pitch shift", "pitch_probability", 0.0),
                 ("the loudest crop", "crop_choices", 1))


@dataclass(frozen=True)
class Budget:
    """What every training of a table shares."""

    name: str
    side: int
    epochs: int
    batch: int  # crops of a step; paper.yaml keeps its own
    n_folds: int  # of each data set; 0: all
    seeds: tuple[int, ...]
    models: tuple[str, ...]  # of table 1: the baseline, PANNs, AST, MAST, PSLA, ASCA


# Half of src.train's epochs: twenty-odd rows on three seeds.
FULL = Budget("full", 224, 60, TrainSettings().batch_size, 0, (0, 1, 2),
              ("efficientnet_b0", "panns_cnn14", "ast", "mast", "psla", "asca_nano"))
# 15 epochs of 130 recordings are 60 steps of 32 crops; of 8 they are 240, at the same cost on a CPU.
SMALL = Budget("small", 128, 15, 8, 2, (0,), ("efficientnet_b0", "panns_cnn10", "ast_tiny", "mast_tiny", "psla_b0", "asca_test"))
BUDGETS = {"full": FULL, "small": SMALL}


@dataclass(frozen=True)
class Row:
    """One line of a table: a training of every data set, or of the one it names."""

    name: str
    flags: tuple[str, ...]  # of src.train
    against: str = "ASCA"  # the row that it is compared with, recording set by recording set
    data: str = ""  # the only data set that has this row; "": all have it
    noise: bool = True  # whether background noise is mixed in, where the data set comes with noise
    source: tuple[str, Row] | None = None  # the data set and row whose weights it begins with
    line: str = ""  # of a figure ...
    x: float = 0.0  # ... and the place on it

    def settings(self) -> TrainSettings:
        return read_flags(self.flags)

    def key(self, data: str, noisy: Collection[str]) -> str:
        """Names what is trained on `data`, whichever table asks for it; `noisy`: the data sets that come with background noise.

        What is off (0, false, none) has no part in it, so that a setting which is added later, off by default, changes no key.
        """
        values = {name: value for name, value in flatten(self.settings()).items() if value and name not in {*ELSEWHERE, "seed", "init"}}
        values["noise"] = self.noise and data in noisy
        if self.source:
            other, row = self.source
            values["init"] = [other, row.key(other, noisy)]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    def network(self) -> str:
        """The model with every setting that changes its graph, whatever the default is: what its size and speed belong to."""
        settings = self.settings()
        default, own = flatten(ModelSettings()), flatten(settings.network)
        foreign = {"drop_path", *(() if settings.model.startswith("asca_") else AscaSettings.__dataclass_fields__)}
        return " ".join([settings.model, *(f"{name}={own[name]}" for name in own if name not in foreign and own[name] != default[name])])


@dataclass(frozen=True)
class Table:
    name: str
    title: str
    rows: tuple[Row, ...]
    note: str = ""
    x: str = ""  # the label of a figure's horizontal axis; "": a table
    paper: dict[str, dict[str, float]] = field(default_factory=dict)  # row -> the paper's data set -> mAP in percent

    def of(self, data: str) -> list[Row]:
        return [row for row in self.rows if row.data in ("", data)]


@cache
def read_flags(flags: tuple[str, ...]) -> TrainSettings:
    """src.train's settings from a row's flags. Raises UserError for a flag that it does not know."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return parse(TrainSettings, list(flags), prog="python -m src.train", description="")
    except SystemExit:
        raise UserError(f"src.train does not take {' '.join(flags)}: {' '.join(said.getvalue().split())[:300]}") from None


def sized(model: str, budget: Budget) -> tuple[str, ...]:
    return ("--model", model, "--input-side", str(budget.side), "--epochs", str(budget.epochs))


def recipe(model: str, budget: Budget, *more: object) -> tuple[str, ...]:
    return (*sized(model, budget), "--batch-size", str(budget.batch), *AS_TRAINED, *map(str, more))


def table1(budget: Budget, data: Sequence[str]) -> Table:
    names = ("Baseline", "PANNs", "AST", "MAST", "PSLA", "ASCA")
    asca, paper = budget.models[-1], replace(budget, epochs=min(budget.epochs, read_flags(("--config", PAPER_YAML)).epochs))
    rows = [Row(name, recipe(model, budget)) for name, model in zip(names, budget.models)]
    return Table(
        "table1", "Table 1: models", (*rows, Row("ASCA, attention over time", recipe(asca, budget, "--head", "attention")),
                                     Row("ASCA (paper.yaml)", ("--config", PAPER_YAML, *sized(asca, paper)))),
        f"All but the last row under the default recipe (ASCA with {THEN}); `src/recipes/paper.yaml` is what the paper states, here for {paper.epochs} epochs. "
        "PSLA is an EfficientNet like the baseline, with heads of attention over time; one row gives ASCA `--head attention`. "
        + ", ".join(f"{name} is `{model}`" for name, model in zip(names, budget.models)) + ".",
        paper={"Baseline": {"BirdCLEF 2023": 77.5, "AudioSet": 25.1, "UCR": 85.3},
               "PANNs": {"BirdCLEF 2023": 79.1, "AudioSet": 27.5, "UCR": 90.9},
               "AST": {"BirdCLEF 2023": 80.6, "AudioSet": 33.7, "UCR": 93.4, "VGG-Sound": 78.1},
               "MAST": {"BirdCLEF 2023": 80.8, "AudioSet": 34.2, "UCR": 93.9, "VGG-Sound": 81.3},
               "PSLA": {"BirdCLEF 2023": 79.2, "AudioSet": 32.7, "UCR": 89.2, "VGG-Sound": 77.8},
               "ASCA": {"BirdCLEF 2023": 81.2, "AudioSet": 35.1, "UCR": 94.2, "VGG-Sound": 82.0}})


def table2(budget: Budget, data: Sequence[str]) -> Table:
    model = budget.models[-1]
    own = "C-C-C-T (ASCA)"
    rows = (Row("C-C-T-T", recipe(model, budget, "--layout", "CCTT"), own), Row("C-C-C-C", recipe(model, budget, "--layout", "CCCC"), own),
            Row(own, recipe(model, budget), own))
    return Table("table2", "Table 2: layouts", rows, "In the paper, C-C-T-T stands below the EfficientNet baseline.",
                 paper={"C-C-T-T": {"BirdCLEF 2023": 75.3}, "C-C-C-C": {"BirdCLEF 2023": 79.4}, own: {"BirdCLEF 2023": 81.2}})


def figure2(budget: Budget, data: Sequence[str]) -> Table:
    """The paper draws "pre-training scales" and says elsewhere that nothing was pre-trained: so both, shares of the training data from
    scratch, and weights that were trained on a share of another data set, fold 0 held out, before they go on here."""
    asca, baseline, rows = budget.models[-1], budget.models[0], []

    def shared(name: str, model: str, share: float) -> Row:
        whole = share == 1
        return Row(name if whole else f"{name}, {share:.0%}", recipe(model, budget, *(() if whole else ("--train-share", share))),
                   "ASCA" if name == "ASCA" or whole else f"ASCA, {share:.0%}", line=name, x=share)

    for share in SHARES:
        rows += [shared("ASCA", asca, share), shared("Baseline", baseline, share)]
    for here in data:
        for there in data:
            if there != here:
                line = f"ASCA from {there}"
                # Without noise, which may be cut from the recordings that are held out here.
                sources = {share: (there, replace(shared("ASCA", asca, share), noise=False)) for share in SHARES}
                rows += [Row(f"{line}, {share:.0%}", recipe(asca, budget), data=here, source=source, line=line, x=share) for share, source in sources.items()]
    return Table("figure2", "Figure 2: shares of the training data, and of pre-training data", tuple(rows),
                 "ASCA, n % and Baseline, n %: trained on a nested, stratified share of each fold's training recordings, for as many steps as on all; "
                 "the baseline is compared with ASCA at the same share. ASCA from X, n %: trained on a share of X first, without background noise. "
                 "The paper's figure compares pre-training scales, while its section 4.1 says that nothing was pre-trained.",
                 x="share of the training data (from X: of the pre-training data)")


def figure3(budget: Budget, data: Sequence[str]) -> Table:
    usual = TrainSettings().network.asca.attn_patch
    rows = [Row(f"{patch} x {patch}", recipe(budget.models[-1], budget, *(() if patch == usual else ("--attn-patch", patch))), f"{usual} x {usual}",
                line="ASCA", x=patch) for patch in PATCHES]
    return Table("figure3", "Figure 3: divisions of the input for attention", tuple(rows),
                 f"{usual} x {usual} is the default. {' '.join(tokens(patch, budget.side) for patch in PATCHES)} For 7 and 14, "
                 "S3's output is resized to them (ours: the paper is silent). The paper found 16 x 16 best and gives no numbers.",
                 x="pixels of the input a token (attn_patch)")


def tokens(patch: int, side: int) -> str:
    return f"{patch} x {patch}: {round(side / patch)} x {round(side / patch)} tokens."


def section42(budget: Budget, data: Sequence[str]) -> Table:
    model, default = budget.models[-1], flatten(TrainSettings())
    changes = [("attention under batch norm", ("--attn-norm", "bn")),
               ("no stochastic depth", ("--drop-path", 0)) if default["drop_path"] else ("stochastic depth 0.2", ("--drop-path", 0.2)),
               ("weight noise 0.01", ("--weight-noise", 0.01)), *([] if default["mixup_probability"] else [("mixup", ("--mixup-probability", 0.5))])]
    changes += [(f"no {name}", (f"--{setting.replace('_', '-')}", off)) for name, setting, off in AUGMENTATIONS if default[setting] != off]
    # Cheaper at inference than the exact GELU: benchmarks/results/inference_activation.md.
    changes += [(f"activation: {title}", ("--activation", name))
                for title, name in (("GELU by tanh", "gelu_tanh"), ("hard swish", "hard_swish"), ("ReLU", "relu"))]
    rows = [Row("ASCA", recipe(model, budget)), *(Row(name, recipe(model, budget, *flags)) for name, flags in changes),
            Row("no background noise", recipe(model, budget), noise=False)]
    return Table("section42", "Section 4.2: regularisation and augmentation, one change at a time", tuple(rows),
                 f"ASCA is the default recipe with {THEN}; each row changes one thing. A data set that comes without background noise lacks the last row. "
                 "The paper names mixup, masking and background noise, finds batch norm best, and gives no numbers; the activations are ours. "
                 "Batch norm and GELU by tanh have since become the default.")


PAPER = {make.__name__: make for make in (table1, table2, figure2, figure3, section42)}
