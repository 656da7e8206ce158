"""Recordings' probabilities from a network: the mean over each one's windows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from .cache import Cache
from .dataset import HeldOutWindows, to_log_mel


@torch.no_grad()
def predict(model: nn.Module, names: list[str], cache: Cache, accelerator, *, batch_size: int, only_first: bool = False) -> np.ndarray:
    """(n, C) each recording's probability: the mean over its windows. The model is left in eval mode."""
    model.eval()
    windows = HeldOutWindows(names, cache, only_first=only_first)
    logits, places = [torch.empty(0)], [torch.empty(0, dtype=torch.long)]
    for window, place in DataLoader(windows, batch_size):
        with accelerator.autocast():
            logits.append(model(to_log_mel(window.to(accelerator.device), cache.config)).float().cpu())
        places.append(place)
    return pd.DataFrame(torch.cat(logits[bool(names):]).sigmoid().numpy()).groupby(torch.cat(places).numpy()).mean().to_numpy()
