"""One line that says with what command, on which machine and when a result was measured."""

from __future__ import annotations

import os
import platform
from datetime import date

import torch

from src.devices import device_name


def about(command: str) -> str:
    return f"`{command}`, {date.today().isoformat()}; {device_name(torch.device('cpu'))}, {os.cpu_count()} cores, Python {platform.python_version()}."
