"""The device with its precision, and recordings' probabilities from a network in training."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader

from .cache import Cache
from .console import UserError
from .dataset import HeldOutWindows, to_log_mel


@dataclass(frozen=True)
class Device:
    torch: torch.device
    amp: torch.dtype | None  # autocast's type; None: full precision

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.torch.type, dtype=self.amp, enabled=self.amp is not None)


def choose_device(name: str, precision: str) -> Device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not usable: {str(error).splitlines()[0]}") from error
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return Device(device, {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])


def keep_freed_memory() -> None:
    """Has glibc keep the memory that tensors free, instead of returning it and faulting it in again at every step:
    asca_test trains 1.5 times as fast on a CPU. Elsewhere it does nothing."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: large tensors on the heap too
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@torch.no_grad()
def predict(model: nn.Module, names: list[str], cache: Cache, device: Device, *, batch_size: int, only_first: bool = False) -> np.ndarray:
    """(n, C) each recording's probability: the mean over its windows. The model is left in eval mode."""
    model.eval()
    windows = HeldOutWindows(names, cache, only_first=only_first)
    logits, places = [], []
    for window, place in DataLoader(windows, batch_size):
        with device.autocast():
            logits.append(model(to_log_mel(window.to(device.torch), cache.config)).float().cpu())
        places.append(place)
    probability = pd.DataFrame(torch.cat(logits).sigmoid().numpy()).groupby(torch.cat(places).numpy()).mean()
    return probability.to_numpy()
