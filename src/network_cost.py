"""What a network costs: its multiply-accumulates, and how many windows a second a CPU computes once it is exported."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .config import AudioConfig
from .engines import Engine, open_runner
from .export import write_onnx


def made_log_mel(n: int, audio: AudioConfig) -> Tensor:
    """(n, 1, n_mels, window_frames) dB of noise."""
    return torch.randn(n, 1, audio.n_mels, audio.window_frames, generator=torch.Generator().manual_seed(0)) * 20 - 50


def settle(model: nn.Module, log_mel: Tensor) -> nn.Module:
    """The model in eval mode with its batch norms' statistics taken from the input: without them a fresh network's logits
    are about 0, and would agree however they are computed."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain mean over what is seen
    with torch.no_grad():
        model.train()(log_mel)
    return model.eval()


def count_gmacs(model: nn.Module, log_mel: Tensor) -> float:
    """Multiply-accumulates of one forward pass, in billions; attention as plain products, since the counter passes over the CPU's fused one."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(log_mel)
    return counter.get_total_flops() / 2e9


def cpu_windows_per_second(model: nn.Module, audio: AudioConfig, threads: int, seconds: float = 1.0) -> float:
    """Of the exported model in onnxruntime, float32, one window a thread as in src.infer: the best of three stretches of time."""
    log_mel = made_log_mel(4 * threads, audio)
    settle(model, log_mel[:4])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(model, log_mel[:2], path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        run = open_runner(path, session, Engine(), threads)
        run(log_mel.numpy(), None)
        rates = []
        for _ in range(3):
            began, n = time.perf_counter(), 0
            while (passed := time.perf_counter() - began) < seconds:
                run(log_mel.numpy(), None)
                n += len(log_mel)
            rates.append(n / passed)
    return max(rates)
