"""AdamW, its learning rate by step, and the moving average of the weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from .models.torchvision_guard import import_timm
from .train_settings import TrainSettings


def learning_rate_at(step: int, settings: TrainSettings, steps_per_epoch: int) -> float:
    """Linear warm-up, over at most half of the steps, then a cosine to 0 (Loshchilov & Hutter 2017), by optimiser step."""
    total = settings.epochs * steps_per_epoch
    warmup = min(round(settings.warmup_epochs * steps_per_epoch), total // 2)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def optimiser_for(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Fused AdamW; biases, norms, position tables and what a network names in `no_weight_decay` (as timm's do) are not decayed."""
    spared = {f"{prefix}.{name}" for prefix, module in model.named_modules() if hasattr(module, "no_weight_decay") for name in module.no_weight_decay()}
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        (rest if parameter.ndim < 2 or "relative_position" in name or name in spared else decayed).append(parameter)
    return torch.optim.AdamW([{"params": decayed, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                             lr=settings.learning_rate, fused=True)


def moving_average(model: nn.Module, decay: float):
    """timm's ModelEmaV3 over parameters and buffers: its decay warms up as 1 - (1 + step)^(-2/3). None where `decay` is 0."""
    return import_timm().utils.ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None
