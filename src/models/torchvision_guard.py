"""Lets timm be imported beside a CPU-only torch, where PyPI's torchvision (a CUDA build) cannot load its operators.

timm imports torchvision, whose import then dies with "operator torchvision::nms does not exist" (pytorch/vision
issue 9085). Declaring the schemas of the two missing operators is enough; nothing here ever calls them.
"""

from __future__ import annotations

import torch

_library: torch.library.Library | None = None  # must stay referenced, or the declarations vanish


def import_timm():
    """Returns the timm module, with torchvision's operators declared first where they are missing."""
    global _library
    if _library is None:
        try:
            import torchvision  # noqa: F401
        except RuntimeError:
            _library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm
