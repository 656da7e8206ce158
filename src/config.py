"""The front-end recipe that travels with every cache, run and model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .console import UserError


@dataclass(frozen=True)
class AudioConfig:
    """How a waveform becomes a log-mel spectrogram. Typed once, at `src.cache`; everyone else reads it.

    The paper (section 3) gives 128 mel bins, a 25 ms Hamming window and a 10 ms hop, and (section 4.1) 32 kHz.
    n_fft, the mel range and the dB range are ours. On 247 real bird recordings 0.005 % of the cells lie
    above db_max; none can lie below db_min, the level of digital silence.
    """

    sample_rate: int = 32_000  # Hz
    n_fft: int = 1024
    win_length: int = 800  # samples: 25 ms
    hop_length: int = 320  # samples: 10 ms
    n_mels: int = 128
    fmin: float = 20.0  # Hz
    fmax: float = 16_000.0  # Hz
    db_min: float = -100.0  # 10 log10(1e-10): silence is stored exactly
    db_max: float = 20.0
    window_seconds: float = 5.0  # what one prediction is made from

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, asdict(self).values())) or self.n_mels < 1:
            raise UserError(f"an audio recipe holds finite numbers and at least one mel bin: {self}")
        if not 0 < self.win_length <= self.n_fft:
            raise UserError(f"win_length {self.win_length} must be within 1..n_fft ({self.n_fft})")
        if not 0 <= self.fmin < self.fmax <= self.sample_rate / 2:
            raise UserError(f"0 <= fmin < fmax <= sample_rate / 2 does not hold: {self.fmin}, {self.fmax}")
        if self.hop_length < 1 or self.window_frames < 1 or self.db_min >= self.db_max:
            raise UserError(f"hop_length, window_seconds or the dB range is not usable: {self}")

    @property
    def window_frames(self) -> int:
        """Frames in one window: 500 for 5 s at a 10 ms hop."""
        return round(self.window_seconds * self.sample_rate / self.hop_length)

    @property
    def frames_per_second(self) -> float:
        return self.sample_rate / self.hop_length

    @property
    def db_step(self) -> float:
        """One step of the cache's uint8 scale, in dB."""
        return (self.db_max - self.db_min) / 255

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any] | str) -> AudioConfig:
        """From `to_dict`, or from its JSON text; unknown or missing keys are refused."""
        values = json.loads(values) if isinstance(values, str) else dict(values)
        known = {field.name for field in fields(cls)}
        if set(values) != known:
            raise UserError(f"audio recipe with other keys than this version's: {sorted(set(values) ^ known)}")
        return cls(**values)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Readable lines `key: old -> new` for every setting in which two nested dicts differ."""
    lines = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key, "(absent)"), new.get(key, "(absent)")
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            lines.append(f"{prefix}{key}: {before} -> {after}")
    return lines
