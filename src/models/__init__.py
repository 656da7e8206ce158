"""MODELS: name -> constructor. A model maps (B, 1, n_mels, window_frames) float32 dB to (B, n_classes) logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import Tensor, nn

from ..config import AudioConfig
from ..console import UserError
from .asca import ASCA, VARIANTS, AscaSettings
from .log_mel_input import LogMelInput


@dataclass(frozen=True)
class ModelSettings:
    input_side: int = 0
    """Side of the square that the log-mel is resized to; 0: the model's own (224; asca_test 128)."""
    input_norm: Literal["window", "fixed"] = "window"
    """Each window by its own mean and deviation, or by constants."""
    drop_path: float = 0.2
    """Stochastic depth: the last block's rate; the first has 0, linear between."""
    asca: AscaSettings = field(default_factory=AscaSettings)


def _asca(variant: str, n_classes: int, side: int, settings: ModelSettings) -> nn.Module:
    return ASCA(variant, n_classes, side=side, drop_path=settings.drop_path, settings=settings.asca)


# name -> (usual input side, constructor of the network behind LogMelInput)
MODELS: dict[str, tuple[int, Callable[[int, int, ModelSettings], nn.Module]]] = {
    f"asca_{variant}": (side, partial(_asca, variant)) for variant, (_, _, _, side) in VARIANTS.items()
}


class Model(nn.Module):
    """Normalisation and resize, then the network."""

    def __init__(self, front: LogMelInput, network: nn.Module) -> None:
        super().__init__()
        self.front, self.network = front, network

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.network(self.front(log_mel))


def create_model(name: str, n_classes: int, audio: AudioConfig, settings: ModelSettings = ModelSettings()) -> Model:
    """A model with fresh weights. Raises UserError for an unknown name or an input side that the network refuses."""
    if name not in MODELS:
        raise UserError(f"unknown model {name}; choose one of {', '.join(MODELS)}")
    usual_side, construct = MODELS[name]
    side = settings.input_side or usual_side
    try:
        network = construct(n_classes, side, settings)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from error
    return Model(LogMelInput(audio, side, settings.input_norm), network)
