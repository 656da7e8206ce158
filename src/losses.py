"""Losses over independent species: binary cross-entropy, focal and asymmetric, one formula."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Loss = Literal["bce", "focal", "asymmetric"]
# (gamma of the present species, gamma of the absent ones, probability by which absent ones are forgiven)
FOCUS: dict[str, tuple[float, float, float]] = {
    "bce": (0.0, 0.0, 0.0),
    "focal": (2.0, 2.0, 0.0),  # Lin et al. 2017, without its class weight
    "asymmetric": (1.0, 4.0, 0.05),  # Ridnik et al. 2021, timm's defaults
}


def multi_label_loss(logits: Tensor, target: Tensor, weight: Tensor, loss: Loss = "bce") -> Tensor:
    """Mean over all (B, C) of weight x focus x cross-entropy; soft targets count in proportion. The focus
    (1 - p of what is true)^gamma passes over what is learnt already; gradient flows through it too (as in both papers and by timm's default)."""
    logits = logits.float()
    if loss == "bce":
        return F.binary_cross_entropy_with_logits(logits, target, weight=weight)
    present_gamma, absent_gamma, forgiven = FOCUS[loss]
    present = logits.sigmoid()
    absent = (1 - present + forgiven).clamp(max=1)
    present_focus, absent_focus = (1 - present) ** present_gamma, (1 - absent) ** absent_gamma
    log_absent = absent.clamp(min=1e-8).log() if forgiven else F.logsigmoid(-logits)  # whose gradient does not vanish where 1 - p is 0 in float32
    entropy = -(target * present_focus * F.logsigmoid(logits) + (1 - target) * absent_focus * log_absent)
    return (weight * entropy).mean()
