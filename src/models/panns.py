"""PANNs' CNN14 and CNN10 (Kong et al. 2020, "PANNs: Large-Scale Pretrained Audio Neural Networks for Audio Pattern Recognition").

Batch norm over the mel bins, blocks of two 3x3 convolutions, mean over frequency, then maximum plus mean over time, a
hidden layer, the classes. The block widths, dropouts and initial weights are the paper's (the authors' code feeds the
classes from before the last dropout). Its input has 64 mel bins by 1,000 frames; here it is the square image that all
models share, so its first norm has `side` rows instead of 64 bins (at 527 classes and 64 rows the parameters are the
paper's 80,753,615 and 5,219,279). It has no stochastic depth.
"""

from __future__ import annotations

from torch import Tensor, nn

# widths of the blocks; every block but CNN14's last halves the map
VARIANTS = {"cnn14": (64, 128, 256, 512, 1024, 2048), "cnn10": (64, 128, 256, 512)}
HALVINGS = {"cnn14": 5, "cnn10": 4}


def block(width_in: int, width_out: int, pool: bool) -> nn.Sequential:
    """(B, width_in, H, W) -> (B, width_out, H/2, W/2), or (H, W) without pooling."""
    layers: list[nn.Module] = []
    for width in (width_in, width_out):
        layers += [nn.Conv2d(width, width_out, 3, padding=1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.AvgPool2d(2)] if pool else []), nn.Dropout(0.2))


class PANN(nn.Module):
    """(B, 1, side, side), rows are mel bins -> (B, n_classes)."""

    def __init__(self, variant: str, n_classes: int, *, side: int, drop_path: float = 0.0) -> None:
        super().__init__()
        widths, halvings = VARIANTS[variant], HALVINGS[variant]
        if side < 2**halvings:
            raise ValueError(f"needs an input side of at least {2**halvings}, not {side}")
        self.bn0 = nn.BatchNorm2d(side)
        self.blocks = nn.Sequential(*(block(width_in, width, pool=number < halvings)
                                      for number, (width_in, width) in enumerate(zip((1, *widths), widths))))
        self.dropout = nn.Dropout(0.5)
        self.fc1 = nn.Linear(widths[-1], widths[-1])
        self.head = nn.Linear(widths[-1], n_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(x.transpose(1, 2)).transpose(1, 2)  # the mel bins are its channels
        x = self.blocks(x).mean(2)  # (B, width, time)
        x = x.amax(2) + x.mean(2)
        return self.head(self.dropout(self.fc1(self.dropout(x)).relu()))
