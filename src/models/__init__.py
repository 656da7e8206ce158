"""MODELS: name -> constructor. A model maps (B, 1, n_mels, window_frames) float32 dB to (B, n_classes) logits.

`timm:<name>` is any other of timm's classifiers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch import Tensor, nn

from ..config import AudioConfig
from ..console import UserError
from .asca import ASCA, VARIANTS, AscaSettings
from .ast import AST
from .log_mel_input import LogMelInput
from .mast import mvit
from .panns import PANN
from .psla import PSLA
from .timm_backbone import timm_backbone


@dataclass(frozen=True)
class ModelSettings:
    input_side: int = 0
    """Side of the square that the log-mel is resized to; 0: the model's own (224; asca_test 128)."""
    input_norm: Literal["window", "fixed"] = "window"
    """Each window by its own mean and deviation, or by constants."""
    drop_path: float = 0.2
    """Stochastic depth: the last block's rate; the first has 0, linear between."""
    asca: AscaSettings = field(default_factory=AscaSettings)


RIVALS: dict[str, Callable[..., nn.Module]] = {
    "efficientnet_b0": partial(timm_backbone, "efficientnet_b0"),
    "panns_cnn14": partial(PANN, "cnn14"),
    "panns_cnn10": partial(PANN, "cnn10"),
    "ast": partial(AST, "base"),
    "ast_tiny": partial(AST, "tiny"),
    "mast": partial(mvit, "base"),
    "mast_tiny": partial(mvit, "tiny"),
    "psla": partial(PSLA, "b2"),
    "psla_b0": partial(PSLA, "b0"),
    "eca_nfnet_l0": partial(timm_backbone, "eca_nfnet_l0"),
    "tf_efficientnetv2_s": partial(timm_backbone, "tf_efficientnetv2_s"),
}

# name -> (usual input side, constructor of the network behind LogMelInput)
MODELS: dict[str, tuple[int, Callable[..., nn.Module]]] = {
    f"asca_{variant}": (side, partial(ASCA, variant)) for variant, (_, _, _, side) in VARIANTS.items()
} | {name: (224, construct) for name, construct in RIVALS.items()}


class Model(nn.Module):
    """Normalisation and resize, then the network."""

    def __init__(self, front: LogMelInput, network: nn.Module) -> None:
        super().__init__()
        self.front, self.network = front, network

    def forward(self, log_mel: Tensor) -> Tensor:
        return self.network(self.front(log_mel))


def create_model(name: str, n_classes: int, audio: AudioConfig, settings: ModelSettings = ModelSettings()) -> Model:
    """A model with fresh weights. Raises UserError for an unknown name or an input side that the network refuses."""
    if name.startswith("timm:"):
        usual_side, construct = 224, partial(timm_backbone, name.removeprefix("timm:"))
    elif name in MODELS:
        usual_side, construct = MODELS[name]
    else:
        raise UserError(f"unknown model {name}; choose one of {', '.join(MODELS)} or timm:<one of timm's>")
    side = settings.input_side or usual_side
    if side < 1:
        raise UserError(f"--input-side {side}: a side has at least one pixel")
    own = {"settings": settings.asca} if name.startswith("asca_") else {}
    try:
        network = construct(n_classes, side=side, drop_path=settings.drop_path, **own)
    except ValueError as error:
        raise UserError(f"model {name}: {error}") from error
    return Model(LogMelInput(audio, side, settings.input_norm), network)
