"""Any of timm's image classifiers on the log-mel image: the paper's baseline and the backbones of BirdCLEF's winners.

`efficientnet_b0` is the paper's Baseline (Tan & Le 2019; the paper cites EfficientNet and gives no size: the smallest is ours).
`eca_nfnet_l0` (a normaliser-free ResNet with channel attention) and `tf_efficientnetv2_s` carry most of the winning entries.
`timm:<name>` takes every other. One input channel, fresh weights: nothing is fetched, so a name's tag (`.fb_in1k`) plays no part.
"""

from __future__ import annotations

import difflib

from torch import nn

from .torchvision_guard import import_timm


def timm_backbone(name: str, n_classes: int, *, side: int, drop_path: float) -> nn.Module:
    """(B, 1, side, side) -> (B, n_classes). Stochastic depth is left out where the network has none. Raises ValueError."""
    timm = import_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name}" + (f"; near it: {', '.join(near)}" if near else ""))
    settings = {"pretrained": False, "in_chans": 1, "num_classes": n_classes}
    weights = timm.get_pretrained_cfg(name)  # None for a former name, tf_efficientnet_b0_ns for one
    if weights and weights.fixed_input_size:
        settings["img_size"] = side
    try:
        return timm.create_model(name, drop_path_rate=drop_path, **settings)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        return timm.create_model(name, **settings)
    except AssertionError as error:
        raise ValueError(f"timm refuses an input of {side} x {side}: {error}") from error
