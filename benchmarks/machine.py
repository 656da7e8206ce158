"""One line that says with what command, on which machine and when a result was measured."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path

import torch


def about(command: str, device: torch.device | None = None) -> str:
    """`device`: what computed, where it may be a GPU; then the card and its CUDA are named too."""
    cpu = platform.processor() or "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    card = ""
    if device is not None and device.type == "cuda":
        card = f"one {torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}; "
    return f"`{command}`, {date.today().isoformat()}; {card}{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}."
