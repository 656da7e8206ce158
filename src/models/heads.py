"""Heads: the last feature map (B, width, frequency, time) -> logits (B, n_classes)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AverageHead(nn.Module):
    """The mean over the map, then a linear layer (CoAtNet's)."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pooled(x))

    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class GemHead(AverageHead):
    """Generalised mean (Radenovic et al. 2018), between the average (power 1) and the maximum; the power is learnt."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__(width, n_classes)
        self.power = nn.Parameter(torch.tensor(3.0))

    def pooled(self, x: Tensor) -> Tensor:
        return x.clamp(min=1e-3).pow(self.power).mean((2, 3)).pow(1 / self.power)


class AttentionHead(nn.Module):
    """Each class weighs the time steps itself, as in sound event detection (Kong et al. 2020). Where PANNs' code clamps the weights' logits to
    10 it takes their tanh, as BirdCLEF's winners do: no step weighs more than e^2 times another."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.attention, self.fc = nn.Conv1d(width, n_classes, 1), nn.Conv1d(width, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean(2)  # (B, width, time)
        return (self.attention(x).tanh().softmax(2) * self.fc(x)).sum(2)


HEADS = {"avg": AverageHead, "gem": GemHead, "attention": AttentionHead}
