"""Tensors on disk: safetensors files that carry their own digest; nothing in them can be executed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .console import UserError
from .storage import atomic


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Writes the tensors and the JSON-able facts, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = json.dumps({"facts": facts, "sha256": _digest(tensors)})  # one entry: safetensors writes several in any order
    with atomic(path) as partial:
        try:
            save_file(tensors, partial, metadata={"about": about})
        except SafetensorError as error:  # a full disk
            raise UserError(f"cannot write {path}: {error}") from error


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts. Raises UserError for a file that is not one of these or of which a bit has changed."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            about = json.loads((file.metadata() or {}).get("about", "{}"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); delete it and run the stage again") from error
    if about.get("sha256") != _digest(tensors):
        raise UserError(f"{path} is damaged: its tensors differ from their SHA-256; delete it and run the stage again")
    return tensors, about["facts"]


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `optimiser.<number of the parameter>.<what>`."""
    return {f"optimiser.{number}.{key}": value
            for number, state in optimiser.state_dict()["state"].items() for key, value in state.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts the state back in each parameter's own memory layout: fused optimisers walk through both side by side."""
    parameters = [parameter for group in optimiser.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimiser":
            number, key = rest.split(".", 1)
            like = parameters[int(number)]
            state.setdefault(int(number), {})[key] = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape else tensor
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
