"""What each step of the default recipe is worth: one change at a time from a plain recipe, and from the grown one."""

from __future__ import annotations

from collections.abc import Sequence

from .paper_tables import Budget, Row, Table

# Every setting that a step changes is spelt out, so that the rows stay what they are when a default changes.
PLAIN = ("--batch-size 16 --learning-rate 1e-3 --warmup-epochs 2 --weight-decay 0.05 --ema-decay 0 --loss bce --label-smoothing 0 "
         "--sampling-power 0.5 --crop-choices 1 --waveform-probability 0.25 --drop-path 0.2 --input-norm window --head avg --activation gelu "
         "--roll-probability 0 --filter-db 0 --stretch 0 --mel-shift-bins 0 --spec-augment-probability 0.5 --frequency-masks 2 "
         "--frequency-mask-bins 16 --time-masks 2 --time-mask-frames 50 --mixup-probability 0.5 --mixup-alpha 0.4 --mixup-target union")
GROWN = "--roll-probability 1 --filter-db 6 --stretch 0.2 --mel-shift-bins 4 --ema-decay 0.99"
# name -> what is changed, from the plain recipe ("plain ...") or from the grown one
STEPS = {
    "time roll": "plain --roll-probability 1",
    "random filters": "plain --filter-db 6",
    "other lengths": "plain --stretch 0.2",
    "mel shift": "plain --mel-shift-bins 4",
    "moving average": "plain --ema-decay 0.99",
    "no stochastic depth": "--drop-path 0",
    "batches of 8": "--batch-size 8",
    "batches of 32": "--batch-size 32",
    "learning rate 3e-3": "--learning-rate 3e-3",
    "learning rate 3e-4": "--learning-rate 3e-4",
    "mixup always, Beta(1, 1)": "--mixup-probability 1 --mixup-alpha 1",
    "mixup of labels in proportion": "--mixup-target linear",
    "no mixup": "--mixup-probability 0",
    "larger masks": "--spec-augment-probability 1 --frequency-mask-bins 24 --time-mask-frames 100",
    "label smoothing 0.1": "--label-smoothing 0.1",
    "focal loss": "--loss focal",
    "asymmetric loss": "--loss asymmetric",
    "generalised mean": "--head gem",
    "attention over time": "--head attention",
    "the loudest of 3 crops": "--crop-choices 3",
    "fixed normalisation": "--input-norm fixed",
    "ReLU": "--activation relu",
    "GELU by tanh": "--activation gelu_tanh",
    "SiLU": "--activation silu",
}


def recipe_table(budget: Budget, data: Sequence[str]) -> Table:
    model = ("--model", budget.models[-1], "--input-side", str(budget.side))

    def row(name: str, flags: str, against: str, epochs: int = budget.epochs, **more) -> Row:
        return Row(name, (*model, "--epochs", str(epochs), *PLAIN.split(), *flags.split()), against, **more)

    rows = [row("plain", "", "plain"), row("grown", GROWN, "plain"), row("grown, twice the epochs", GROWN, "grown", 2 * budget.epochs)]
    rows += [row(name, flags.removeprefix("plain"), "plain") if flags.startswith("plain") else row(name, f"{GROWN} {flags}", "grown")
             for name, flags in STEPS.items()]
    rows.append(row("no background noise", GROWN, "grown", noise=False))
    rows.append(Row("paper.yaml", ("--config", "src/recipes/paper.yaml", *model), "plain"))
    return Table("recipe", "The recipe, step by step", tuple(rows),
                 f"plain: `{PLAIN}`. grown: plain with `{GROWN}`. The first five steps are compared with plain, the others with grown.")
