"""What each step of the recipe is worth: one change at a time from all steps together, and the plain recipe that they grew from."""

from __future__ import annotations

from collections.abc import Sequence

from .paper_tables import PAPER_YAML, Budget, Row, Table

# Every setting that a step changes is spelt out, so that the rows stay what they are when a default changes.
PLAIN = ("--batch-size 32 --learning-rate 1e-3 --warmup-epochs 2 --weight-decay 0.05 --ema-decay 0 --loss bce --label-smoothing 0 "
         "--sampling-power 0.5 --crop-choices 1 --waveform-probability 0.25 --drop-path 0.2 --input-norm window --head avg --attn-norm ln --activation gelu "
         "--roll-probability 0 --filter-db 0 --stretch 0 --mel-shift-bins 0 --spec-augment-probability 0.5 --frequency-masks 2 "
         "--frequency-mask-bins 16 --time-masks 2 --time-mask-frames 50 --mixup-probability 0.5 --mixup-alpha 0.4 --mixup-target union")
ALL = (f"{PLAIN} --learning-rate 3e-3 --warmup-epochs 5 --drop-path 0 --head gem --ema-decay 0.99 --roll-probability 1 --filter-db 6 --stretch 0.2 "
       "--mel-shift-bins 4")
DEFAULT = "--mixup-probability 0 --learning-rate 1e-3 --attn-norm bn --activation gelu_tanh"
CHANGES = {
    "no mixup": "--mixup-probability 0",
    "no mixup, learning rate 1e-3": "--mixup-probability 0 --learning-rate 1e-3",
    "the default (batch norm, GELU by tanh)": DEFAULT,
    "the default without roll, filters, stretch and mel shift": f"{DEFAULT} --roll-probability 0 --filter-db 0 --stretch 0 --mel-shift-bins 0",
    "learning rate 1e-3": "--learning-rate 1e-3",
    "stochastic depth 0.2": "--drop-path 0.2",
    "average instead of generalised mean": "--head avg",
    "no moving average of the weights": "--ema-decay 0",
    "mixup of labels in proportion": "--mixup-target linear",
    "no time roll, no random filters": "--roll-probability 0 --filter-db 0",
    "no stretch, no mel shift": "--stretch 0 --mel-shift-bins 0",
    "larger masks": "--spec-augment-probability 1 --frequency-mask-bins 24 --time-mask-frames 100",
    "label smoothing 0.1": "--label-smoothing 0.1",
}


def recipe_table(budget: Budget, data: Sequence[str]) -> Table:
    size = ("--model", budget.models[-1], "--input-side", str(budget.side))

    def row(name: str, flags: str, *, noise: bool = False) -> Row:
        return Row(name, (*size, "--epochs", str(budget.epochs), *flags.split()), "all steps", noise=noise)

    rows = [row("all steps", ALL), *(row(name, f"{ALL} {change}") for name, change in CHANGES.items()), row("plain", PLAIN),
            row("with background noise", ALL, noise=True), Row("paper.yaml (its 30 epochs)", ("--config", PAPER_YAML, *size), "all steps", noise=False)]
    return Table("recipe", "The recipe, step by step", tuple(rows),
                 f"All steps: `{ALL}` (where a flag stands twice, the last one counts). Plain: `{PLAIN}`. Without background noise but where a row says so.")
