"""The processes, device and precision of a training, through Accelerate: one CPU, one GPU, or many."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch
from torch import Tensor

from .console import UserError, n_processes, usable_cores
from .models.torchvision_guard import import_timm


def keep_freed_memory() -> None:
    """Has glibc keep the memory that tensors free, instead of returning it and faulting it in again at every step,
    which takes a large part of a small network's training on a CPU. Elsewhere it does nothing."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return
    libc.mallopt(-4, 0)  # M_MMAP_MAX: large tensors on the heap too
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def start(*, device: str, precision: str, accumulate: int, threads: int):
    """The Accelerator of this process, alone or one of those that `accelerate launch` or torchrun started.

    Raises UserError for a device that is not there, or cannot compute in this precision.
    """
    chosen = choose_device(device)
    if precision == "auto":
        precision = "fp32" if chosen.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if precision == "fp16" and chosen.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; a CPU has fp32 and bf16")
    import_timm()  # Accelerate imports torchvision too: the guard goes first
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import GradientAccumulationPlugin

    AcceleratorState._reset_state()  # a second training in this process may choose another precision
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="no" if precision == "fp32" else precision,
                              gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate, sync_with_dataloader=False))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, usable_cores() // here))
    return accelerator


def release(accelerator) -> None:
    """Forgets a training whose last reference is gone, so that the next one finds the memory free and scales its gradients from the start."""
    accelerator.free_memory()
    accelerator.free_memory()  # the first one collects before it lets go of the network, which under autocast refers to itself
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(torch.amp.GradScaler(accelerator.device.type).state_dict())


def require_same(accelerator, facts: dict) -> None:
    """Raises UserError, in every process, where these facts are not the same in all of them."""
    from accelerate.utils import gather_object

    everyone = gather_object([facts])
    differing = [name for name in facts if any(other[name] != everyone[0][name] for other in everyone)]
    if differing:
        raise UserError(f"the processes do not agree on {', '.join(differing)}: all need the same data and one run folder that all nodes share, and GPUs "
                        "of one kind or a --precision")


def device_name(device: torch.device) -> str:
    """The GPU's own name, or the CPU's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return next(iter(names), platform.machine())
    return platform.processor() or platform.machine()


def choose_device(name: str) -> torch.device:
    """auto: a GPU where there is one. Raises UserError for a device that cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # a process of several keeps to its own GPU from the start
            if device.index is not None and n_processes() > 1:
                raise UserError(f"--device {name}: each of several processes takes its own GPU; CUDA_VISIBLE_DEVICES says which there are")
            if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count() > 0:
                raise UserError(f"{os.environ['LOCAL_WORLD_SIZE']} processes for {torch.cuda.device_count()} GPU(s): start no more of them than there are")
            torch.cuda.set_device(device if device.index is not None else int(os.environ.get("LOCAL_RANK", "0")))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not usable: {str(error).splitlines()[0]}") from error
    return device


def loader_workers(wanted: int, *, on_gpu: bool, processes: int = 1) -> int:
    """Loader processes of each training process: what is wanted, or where that is -1 none on a CPU, one a core (at most 16) beside a GPU."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))  # of them on this machine
    return wanted if wanted >= 0 else min(16, max(1, usable_cores() // here)) if on_gpu else 0


class Later:
    """A device's number on its way to the host. `value` waits for what was queued before it alone: a GPU goes on with what came after."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.detach().to("cpu", non_blocking=True)  # from a GPU: into pinned memory
        self._there = torch.cuda.Event() if number.is_cuda else None
        if self._there:
            self._there.record()

    def value(self) -> float:
        if self._there:
            self._there.synchronize()
        return self._number.item()
