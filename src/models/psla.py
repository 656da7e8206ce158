"""PSLA's network (Gong et al. 2021): an EfficientNet, mean over frequency, four heads of attention over time.

Each head has for every class and time step an attention and a probability; a class's probability is their weighted mean,
first over time, then over the heads. The head weights are learnt. The heads are as large as the number of classes makes
them: 5.9 M parameters at the paper's 527 (13.6 M in all, its figure), 3.0 M at 264 (10.7 M).

The paper's code returns that probability; here its logit is returned, summed in logarithms, so that neither a certain
yes nor a certain no is rounded. For that the head weights add up to one (a softmax; the paper's are free and start equal,
as here). The paper's trunk is B2 (`b2`); `b0` is its smaller one. Pretraining, the P of its name, plays no part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .torchvision_guard import import_timm

HEADS = 4


class PSLA(nn.Module):
    """(B, 1, side, side), rows are mel bins -> (B, n_classes)."""

    def __init__(self, variant: str, n_classes: int, *, side: int, drop_path: float) -> None:
        super().__init__()
        self.trunk = import_timm().create_model(f"efficientnet_{variant}", in_chans=1, num_classes=0, drop_path_rate=drop_path)
        self.attention = nn.Conv1d(self.trunk.num_features, HEADS * n_classes, 1)
        self.probability = nn.Conv1d(self.trunk.num_features, HEADS * n_classes, 1)
        self.head_weight = nn.Parameter(torch.zeros(HEADS))  # logarithms, before the softmax

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk.forward_features(x).mean(2)  # (B, width, time)
        attention = F.logsigmoid(self.attention(x).float()).unflatten(1, (HEADS, -1))  # (B, heads, classes, time)
        weight = attention - attention.logsumexp(3, keepdim=True) + self.head_weight.log_softmax(0)[:, None, None]
        logit = self.probability(x).float().unflatten(1, (HEADS, -1))
        return (weight + F.logsigmoid(logit)).logsumexp((1, 3)) - (weight + F.logsigmoid(-logit)).logsumexp((1, 3))
