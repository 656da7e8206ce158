"""What each step of the recipe is worth: one change at a time over half the default's epochs, the default, and the recipes that it grew from.
And the default recipe by the size of ASCA."""

from __future__ import annotations

from collections.abc import Sequence

from .paper_tables import PAPER_YAML, Budget, Row, Table, sized
from .train_settings import TrainSettings

# Every setting that a step changes is spelt out, so that the rows stay what they are when a default changes.
DEFAULT = ("--batch-size 32 --learning-rate 1e-3 --warmup-epochs 5 --weight-decay 0.05 --ema-decay 0.99 --loss bce --label-smoothing 0 "
           "--sampling-power 0.5 --crop-choices 1 --waveform-probability 0.25 --drop-path 0 --input-norm window --head gem --attn-norm bn "
           "--activation gelu_tanh --roll-probability 1 --filter-db 6 --stretch 0.2 --mel-shift-bins 4 --spec-augment-probability 0.5 "
           "--frequency-masks 2 --frequency-mask-bins 16 --time-masks 2 --time-mask-frames 50 --mixup-probability 0")
ALL = f"{DEFAULT} --learning-rate 3e-3 --attn-norm ln --activation gelu --mixup-probability 0.5 --mixup-alpha 0.4 --mixup-target union"
# One change at a time: from all steps, among which the default was sought, and from the default that was found.
CHANGES = {
    "no mixup": "--mixup-probability 0",
    "learning rate 1e-3": "--learning-rate 1e-3",
    "stochastic depth 0.2": "--drop-path 0.2",
    "average instead of generalised mean": "--head avg",
    "no moving average of the weights": "--ema-decay 0",
    "mixup of labels in proportion": "--mixup-target linear",
}
DEFAULT_CHANGES = {
    "with layer norm and the exact GELU": "--attn-norm ln --activation gelu",
    "with hard swish": "--activation hard_swish",
    "with ReLU": "--activation relu",
    "without roll, filters, stretch and mel shift": "--roll-probability 0 --filter-db 0 --stretch 0 --mel-shift-bins 0",
    "with larger masks": "--spec-augment-probability 1 --frequency-mask-bins 24 --time-mask-frames 100",
    "with label smoothing 0.1": "--label-smoothing 0.1",
}


SIZES = ("asca_test", "asca_nano", "asca_0")


def recipe_table(budget: Budget, data: Sequence[str]) -> Table:
    size, half, whole = ("--model", budget.models[-1], "--input-side", str(budget.side)), f"{budget.epochs} epochs", f"{2 * budget.epochs} epochs"
    if 2 * budget.epochs == TrainSettings().epochs:
        whole = f"the default ({whole})"

    def row(name: str, flags: str, against: str = half, *, epochs: int = budget.epochs, noise: bool = False) -> Row:
        return Row(name, (*size, "--epochs", str(epochs), *flags.split()), against, noise=noise)

    rows = [row(whole, DEFAULT, epochs=2 * budget.epochs),
            row(f"{2 * budget.epochs} epochs with hard swish and label smoothing 0.1", f"{DEFAULT} --activation hard_swish --label-smoothing 0.1",
                whole, epochs=2 * budget.epochs),
            row(half, DEFAULT),
            *(row(f"{half} {name}", f"{DEFAULT} {change}") for name, change in DEFAULT_CHANGES.items()),
            row(f"{half} with background noise", DEFAULT, noise=True),
            Row("paper.yaml (its 30 epochs)", ("--config", PAPER_YAML, *size), whole, noise=False),
            row("all steps", ALL), *(row(name, f"{ALL} {change}", "all steps") for name, change in CHANGES.items())]
    return Table("recipe", "The recipe, step by step", tuple(rows),
                 f"All but paper.yaml's have the default's settings, `{DEFAULT}`, and what their names say; the steps are compared over half "
                 "the first row's epochs. "
                 f"All steps, from which the default was sought: `{ALL}`. (Where a flag stands twice, the last one counts.) "
                 "Without background noise but where a row says so.")


def sizes_table(budget: Budget, data: Sequence[str]) -> Table:
    """The default recipe takes --epochs 120."""
    rows = tuple(Row(model, (*sized(model, budget), *DEFAULT.split()), SIZES[0]) for model in SIZES)
    return Table("sizes", "The default recipe by the size of ASCA", rows, f"All with the default's settings: `{DEFAULT}`.")
