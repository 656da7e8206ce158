"""Every model that can be trained: its size, its speed, whether gradients reach all of it, whether onnxruntime computes the same.

    python -m benchmarks.models [--name asca_nano ast ...]

At each one's usual input side, with fresh weights and batch norms settled on the input. Writes benchmarks/results/models.md.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.machine import about
from src.config import AudioConfig
from src.console import UserError, progress, say, stage
from src.export import assert_parity, write_onnx
from src.models import MODELS, create_model
from src.network_cost import count_gmacs, made_log_mel, settle
from src.settings import parse
from src.storage import write_text
from src.train_settings import TrainSettings


@dataclass(frozen=True)
class ModelsSettings:
    name: tuple[str, ...] = ()
    """Models (also timm:<name>); by default all."""
    n_classes: int = 264
    input_side: int = 0
    """0: the model's own."""
    batch_size: int = 2
    """Of the training pass; onnxruntime is compared at 1, 3 and 8."""


def unreached(model: nn.Module, log_mel: Tensor) -> list[str]:
    """The parameters that get no gradient. A branch whose last gain starts at zero (as in NFNets) passes none in the very first
    step, so what is all zero is set to 0.1."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.constant_(parameter, 0.1)
    logits = model(log_mel)
    (logits * torch.arange(1.0, 1 + logits.shape[1])).sum().backward()
    return [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def measure(name: str, settings: ModelsSettings) -> tuple[str, bool]:
    """The model's line of the table, and whether all is as it should be."""
    audio = AudioConfig()
    log_mel = made_log_mel(8, audio)
    torch.manual_seed(0)
    model = create_model(name, settings.n_classes, audio, replace(TrainSettings().network, input_side=settings.input_side))
    parameters = sum(p.numel() for p in model.parameters())
    began = time.process_time()  # of one thread: what else the machine does plays no part
    dead = unreached(model.train(), log_mel[: settings.batch_size])
    step = time.process_time() - began
    model.zero_grad(set_to_none=True)
    settle(model, log_mel[:4])
    gmacs = count_gmacs(model, log_mel[:1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, log_mel[:2], path)
        try:
            parity = "{:.0e} / {:.0e}".format(*assert_parity(model, path, log_mel))
            good = not dead
        except UserError as error:
            parity, good = str(error), False
    cells = (name, model.front.rows.shape[0], f"{parameters / 1e6:.2f}", f"{gmacs:.2f}", f"{settings.batch_size / step:.1f}",
             "all" if not dead else f"all but {len(dead)}, {dead[0]} for one", parity)
    return f"| {' | '.join(map(str, cells))} |", good


@stage
def main(argv: list[str] | None = None) -> int:
    settings = parse(ModelsSettings, argv, prog="python -m benchmarks.models", description=__doc__)
    torch.set_num_threads(1)
    rows, all_good = [], True
    for name in progress(settings.name or list(MODELS), what="models", unit="model"):
        row, good = measure(name, settings)
        say(row)
        rows.append(row)
        all_good &= good
    text = "\n".join([
        "# Models", "", about("python -m benchmarks.models"), "",
        f"{settings.n_classes} classes, fresh weights, one thread, fp32. GMACs: of one window. "
        f"Trained crops: the first forward and backward pass, of a batch of {settings.batch_size}, by CPU time. "
        "Gradients: the parameters that one backward pass reaches. "
        "Parity: the largest difference of logits / probabilities between torch and onnxruntime at batch 1, 3 and 8, within the export's bounds.", "",
        "| model | input side | parameters, M | GMACs | trained crops a CPU second | gradients reach | parity |", "|---|---|---|---|---|---|---|", *rows, ""])
    if not settings.name:
        write_text(Path("benchmarks/results/models.md"), text)
    return int(not all_good)


if __name__ == "__main__":
    sys.exit(main())
