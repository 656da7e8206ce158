"""MAST, Multiscale Audio Spectrogram Transformer (Zhu & Omar 2023), as MViTv2: attention over ever fewer, ever wider tokens.

Its authors published no code. Their abstract gives 42 % fewer parameters than AST and a fifth of its multiplications;
MViTv2-B (Li et al. 2022), whose pooled attention they build on, has 41 % fewer (51.1 M at 527 classes) and is taken for
it. Theirs pools along time alone in some stages, for spectrograms that are far longer than high; the image here is square,
so every stage pools both axes, as MViTv2 does. `tiny` is MViTv2-T, the smallest published.
"""

from __future__ import annotations

from torch import nn

from .torchvision_guard import import_timm


def mvit(variant: str, n_classes: int, *, side: int, drop_path: float) -> nn.Module:
    """(B, 1, side, side) -> (B, n_classes). Raises ValueError for a side that its stages do not divide."""
    if side < 32 or side % 32:
        raise ValueError(f"needs an input side that is a multiple of 32, not {side}")
    return import_timm().create_model(f"mvitv2_{variant}", img_size=side, in_chans=1, num_classes=n_classes, drop_path_rate=drop_path)
