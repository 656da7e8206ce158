"""AST, Audio Spectrogram Transformer (Gong et al. 2021): a DeiT over overlapping 16x16 patches of the spectrogram.

As in its paper: patches of 16 with stride 10, a learnt position for each patch, DeiT's class and distillation tokens,
and a layer norm and one linear layer on the two tokens' mean. What differs: the image is the 224x224 that all models
share (21 x 21 patches) instead of 128x1024 (12 x 101), so there are fewer position vectors (86.0 M parameters at 527
classes instead of 86.6 M; the 88 M sometimes quoted count two ImageNet heads that the authors' code keeps and never
uses), the weights are fresh, and the input's deviation is 1 instead of 0.5. `tiny` is DeiT-tiny, the authors'
smallest. Stochastic depth (off in the paper) passes through.
"""

from __future__ import annotations

from torch import Tensor, nn

from .torchvision_guard import import_timm

PATCH, STRIDE = 16, 10


class AST(nn.Module):
    """(B, 1, side, side) -> (B, n_classes). Raises ValueError for a side below one patch."""

    def __init__(self, variant: str, n_classes: int, *, side: int, drop_path: float) -> None:
        super().__init__()
        if side < PATCH:
            raise ValueError(f"needs an input side of at least {PATCH}, not {side}")
        patches = (side - PATCH) // STRIDE + 1  # along each axis
        self.vit = import_timm().create_model(f"deit_{variant}_distilled_patch16_224", img_size=PATCH * patches, in_chans=1, num_classes=0,
                                              drop_path_rate=drop_path)
        self.vit.patch_embed.proj.stride = (STRIDE, STRIDE)  # timm's patches touch: it was told of an image with as many
        self.vit.patch_embed.img_size = None  # and no longer checks for that image
        self.norm = nn.LayerNorm(self.vit.num_features)
        self.head = nn.Linear(self.vit.num_features, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.vit.forward_features(x)  # (B, 2 + patches^2, width)
        return self.head(self.norm(tokens[:, :2].mean(1)))
