"""Windows -> rows in several ways, from one pass over the closest windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import convolve1d

from src import submission

HOPS = (5.0, 2.5, 1.25)  # seconds
SMOOTH = (0.25, 0.5, 0.25)  # of the row before, the row, the row after


@dataclass(frozen=True)
class Option:
    hop: float = 5.0
    pooling: str = "mean"  # of src.submission
    smooth: bool = False

    def __str__(self) -> str:
        return f"hop {self.hop:g} s, {self.pooling}" + (", smoothed" if self.smooth else "")


BASE = Option()
OPTIONS = tuple(Option(hop, pooling, smooth) for smooth in (False, True) for hop in HOPS for pooling in submission.POOLINGS
                if (hop, pooling) != (5.0, "max"))  # one window a row is its own maximum


def window_starts(n: int, window_seconds: float) -> np.ndarray:
    """Seconds at which the windows of any of the hops start, each once: where hops divide each other, the closest hop's."""
    return np.unique(np.concatenate([submission.window_starts(n, window_seconds, min(hop, window_seconds)) for hop in HOPS]))


def rows(windows: np.ndarray, n: int, window_seconds: float, option: Option) -> np.ndarray:
    """(windows at `window_starts`, C) -> (n, C) float32."""
    starts = submission.window_starts(n, window_seconds, min(option.hop, window_seconds))
    windows = windows[np.searchsorted(window_starts(n, window_seconds), starts)]
    pooled = submission.rows_from_windows(windows, starts, window_seconds, n, option.pooling)
    return convolve1d(pooled, SMOOTH, axis=0, mode="nearest") if option.smooth else pooled
