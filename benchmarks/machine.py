"""One line that says with what command, on which machine and when a result was measured."""

from __future__ import annotations

import os
import platform
from datetime import date

import torch

from src.devices import device_name


def about(command: str, device: torch.device | None = None) -> str:
    """`device`: what computed, where it may be a GPU; then the card and its CUDA are named too."""
    card = f"one {device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}; " if device is not None and device.type == "cuda" else ""
    return f"`{command}`, {date.today().isoformat()}; {card}{device_name(torch.device('cpu'))}, {os.cpu_count()} cores, Python {platform.python_version()}."
