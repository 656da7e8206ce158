"""The first layer of every model: float32 dB in, a normalised square image out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import AudioConfig

DYNAMIC_RANGE = 80.0  # dB below the window's loudest cell that are told apart, as librosa's top_db
EXPECTED_MEAN, EXPECTED_STD = -42.0, 17.0  # dB, of 247 real bird recordings: the `fixed` normalisation


class LogMelInput(nn.Module):
    """(B, 1, n_mels, window_frames) dB -> (B, 1, side, side), normalised; the paper's 224 x 224 input.

    The paper says neither how to normalise nor how to resize: both are ours.
    `window` normalises each window by its own mean and standard deviation, 80 dB below its peak and up: a
    recorder's gain does not matter. `fixed` subtracts and divides by constants. The resize is bilinear with
    antialiasing (as PIL's, and torch's interpolate(antialias=True)), written as two fixed matrices, since the
    exported graph has no operator for it.
    """

    def __init__(self, audio: AudioConfig, side: int, norm: str) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("rows", _resize_matrix(audio.n_mels, side), persistent=False)
        self.register_buffer("columns", _resize_matrix(audio.window_frames, side).T.contiguous(), persistent=False)

    def forward(self, log_mel: Tensor) -> Tensor:
        with torch.autocast(log_mel.device.type, enabled=False):
            x = log_mel.to(self.rows.dtype)  # float32, or float64 where an export is checked
            x = normalised(x) if self.norm == "window" else (x - EXPECTED_MEAN) / EXPECTED_STD
            x = self.rows @ x @ self.columns
            # One channel leaves the memory format open, and convolutions whose weights do so too (NFNets standardise theirs) would
            # compute in the slower one: these strides say channels_last. An exported graph has none of it.
            return x.squeeze(1).unsqueeze(3).permute(0, 3, 1, 2) if self.training else x


def normalised(x: Tensor) -> Tensor:
    """(B, 1, n_mels, frames) dB -> the same by each window's own mean and standard deviation."""
    x = torch.maximum(x, x.amax((2, 3), keepdim=True) - DYNAMIC_RANGE)
    x = x - _mean(x)
    x = x - _mean(x)  # takes the first one's rounding away, to which a network can be sensitive
    return x / (_mean(x.square()).sqrt() + 1.0)  # + 1 dB: silence stays zero


def _mean(x: Tensor) -> Tensor:
    """(B, 1, 1, 1) in two short sums: one float32 sum over 64,000 cells is off by 1e-5 in onnxruntime."""
    return x.mean(3, keepdim=True).mean(2, keepdim=True)


def _resize_matrix(size: int, side: int) -> Tensor:
    """(side, size): the weights with which `size` samples are resized to `side`."""
    identity = torch.eye(size)[None, None]
    return F.interpolate(identity, size=(side, size), mode="bilinear", antialias=True, align_corners=False)[0, 0]
