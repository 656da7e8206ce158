"""Noise on the weights while a step's gradient is computed: the paper's "weighted noise" (section 4.2), which it does not define; ours."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class WeightNoise:
    """Between `add` and `remove` every weight of two or more dimensions is w + n, n ~ N(0, (share x rms(w))^2), rms over its tensor.

    Forward and backward see the noise; the optimiser and the moving average meet the kept weights, put back bit for bit. The noise is
    drawn once a step, so that all parts of a batch share it, from torch's generator: another on each process, whose gradients are
    averaged over several draws. Biases and norms are spared. With a share of 0 nothing is drawn.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        self.share = share
        self.weights: list[Tensor] = [p for p in model.parameters() if p.ndim >= 2] if share else []
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def add(self) -> None:
        """Does nothing where noise is on already."""
        if not self.weights or self.kept:
            return
        self.kept = [weight.clone() for weight in self.weights]
        noise = [torch.randn_like(weight) for weight in self.weights]
        deviation = torch._foreach_norm(self.weights)
        torch._foreach_mul_(deviation, [self.share / weight.numel() ** 0.5 for weight in self.weights])
        torch._foreach_mul_(noise, deviation)
        torch._foreach_add_(self.weights, noise)

    @torch.no_grad()
    def remove(self) -> None:
        if self.kept:
            torch._foreach_copy_(self.weights, self.kept)
            self.kept = []
