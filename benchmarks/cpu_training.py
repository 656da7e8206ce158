"""What an activation costs where a CPU trains: crops a CPU second of the whole step, by model.

    python -m benchmarks.cpu_training [--models asca_test asca_nano] [--activations gelu_tanh hard_swish ...]

One thread. A step is forward, loss, backward, clipping, AdamW and the moving average, of src.train's default network on a made batch.
The activations take turns, and the best of the rounds counts. Writes benchmarks/results/cpu_training.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.machine import about
from src.config import AudioConfig
from src.console import progress, say, stage
from src.devices import keep_freed_memory
from src.losses import multi_label_loss
from src.models import create_model
from src.models.asca import ACTIVATIONS
from src.network_cost import made_log_mel
from src.optimiser import moving_average, optimiser_for
from src.settings import parse
from src.storage import write_text
from src.train_settings import TrainSettings

N_CLASSES = 264


@dataclass(frozen=True)
class CpuTrainingSettings:
    models: tuple[str, ...] = ("asca_test", "asca_nano")
    activations: tuple[str, ...] = ("gelu_tanh", *(name for name in ACTIVATIONS if name != "gelu_tanh"))
    """The first one is what the others are compared with."""
    batch_size: int = 8
    rounds: int = 4
    out: Path = Path("benchmarks/results/cpu_training.md")


def step_of(model: str, activation: str, batch_size: int) -> Callable[[], None]:
    """One step of a training of this model, to be called again and again."""
    settings, audio = TrainSettings(), AudioConfig()
    network_settings = replace(settings.network, asca=replace(settings.network.asca, activation=activation))
    torch.manual_seed(0)
    network = create_model(model, N_CLASSES, audio, network_settings).to(memory_format=torch.channels_last).train()
    optimiser, average = optimiser_for(network, settings), moving_average(network, settings.ema_decay)
    log_mel, target = made_log_mel(batch_size, audio), torch.eye(N_CLASSES)[:batch_size]
    weight = torch.ones_like(target)

    def step() -> None:
        multi_label_loss(network(log_mel), target, weight, settings.loss).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip_gradient)
        optimiser.step()
        optimiser.zero_grad()
        average.update(network, step=1)

    return step


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(CpuTrainingSettings, argv, prog="python -m benchmarks.cpu_training", description=__doc__)
    keep_freed_memory()
    torch.set_num_threads(1)
    rows = []
    for model in settings.models:
        steps = {activation: step_of(model, activation, settings.batch_size) for activation in settings.activations}
        for step in steps.values():
            step()  # warms up
        taken: dict[str, list[float]] = {activation: [] for activation in steps}
        for _ in progress(range(settings.rounds), what=model, unit="round"):
            for activation, step in steps.items():
                began = time.process_time()  # of one thread: what else the machine does plays little part
                step()
                taken[activation].append(time.process_time() - began)
        first = min(taken[settings.activations[0]])
        for activation, seconds in taken.items():
            rows.append(f"| {model} | {activation} | {settings.batch_size / min(seconds):.2f} | {first / min(seconds):.2f} |")
            say(rows[-1])
    words = " ".join(("--models", *settings.models, "--activations", *settings.activations))
    write_text(settings.out, "\n".join([
        "# Training on a CPU, by activation", "", about(f"python -m benchmarks.cpu_training {words}"), "",
        f"One thread, float32, batches of {settings.batch_size}, at each model's usual input side, {N_CLASSES} classes. Of {settings.rounds} rounds, "
        f"in which the activations take turns, the best. Ratio: against `{settings.activations[0]}`.", "",
        "| model | activation | trained crops a CPU second | ratio |", "|---|---|---|---|", *rows, ""]))


if __name__ == "__main__":
    sys.exit(main())
