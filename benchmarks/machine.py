"""One line that says with what command, on which machine and when a result was measured."""

from __future__ import annotations

import os
import platform
from datetime import date
from pathlib import Path


def about(command: str) -> str:
    cpu = platform.processor() or "unknown CPU"
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0] if names else cpu
    return f"`{command}`, {date.today().isoformat()}; {cpu}, {os.cpu_count()} cores, Python {platform.python_version()}."
