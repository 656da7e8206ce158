"""ASCA, Audio Spectrogram Convolution Attention: a CoAtNet-like C-C-C-T network for log-mel spectrograms.

After Li et al., "ASCA: Less Audio Data Is More Insightful". What is where, and what it rests on:

    224 x 224 input                             LogMelInput           section 3; the resize is ours
    S0 two-layer convolution stem               Stem                  section 3
    S1..S3 (C): inverted bottleneck x4 with     MBConv                section 3, its reference [33]
        squeeze-excitation and a residual join
    3x3 depthwise convolution in it; norm first                       the paper is silent; CoAtNet's
    squeeze-excitation to a quarter of the      SqueezeExcite         the paper is silent; timm's
        unexpanded width, SiLU between
    S4 (T): self-attention with a relative      Transformer           equations 1 and 3
        position term w_{i-j}                   RelativeAttention
    MLP behind it, expansion 4; norm before     Transformer, Mlp      the paper is silent; CoAtNet's
        attention and MLP (pre-norm)
    layout C-C-C-T (C-C-T-T, C-C-C-C)           `layout`              table 2
    division of the input into 7..32 pixels     `attn_patch`          section 4.4.3, figure 3; as tokens of S4: ours
    w_{i-j} as a table per head, or none        `rel_pos`             equations 3 and 2; "mlp": ours
    batch norm in the attention stage           `attn_norm="bn"`      section 4.2; "ln": CoAtNet
    expansion of the input's width              `expand_from="input"` section 3; "output": CoAtNet
    random depth                                `drop_path`           section 4.2; the rate, 0.2: ours (src.train's default is 0: off)
    weighted noise                              src/weight_noise.py   section 4.2, undefined there: ours
    pre-training                                src/initialise.py     figure 2; from scratch: section 4.1
    widths and depths                           VARIANTS              the paper is silent; 0 and 1: CoAtNet's, nano and pico: timm's,
                                                                      tiny and test: ours
    heads of 32, Q/K/V projections, scale       RelativeAttention     the paper is silent; CoAtNet's
    activation; pooling of the shortcuts        `activation`, `pool`  the paper is silent; CoAtNet's (its pooling is "max")
    norm, mean and linear layer at the end      `head="avg"`          the paper is silent; timm's; "gem" (src.train's default) and
                                                                      "attention": ours
    initial weights                             _initialise           the paper is silent; ours

CoAtNet (Dai et al. 2021) is taken as timm's MaxxVit has it, with its parameter names, so that its state dicts load. Needs torch
alone: copy this file and heads.py and use them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .heads import HEADS


@dataclass(frozen=True)
class AscaSettings:
    layout: Literal["CCCT", "CCTT", "CCCC"] = "CCCT"
    """What S1..S4 are: C = MBConv, T = transformer (table 2)."""
    attn_patch: Literal[7, 14, 16, 32] = 32
    """Pixels of the input per token of S4: 32 = CoAtNet's 7x7 tokens at 224; 16 = S4 keeps stride 16; 7 and 14: resized."""
    rel_pos: Literal["bias", "mlp", "none"] = "bias"
    """w_{i-j}: a table per head (equation 3), a small network of the distance, or nothing (equation 2)."""
    attn_norm: Literal["ln", "bn"] = "ln"
    """The norm of the T stages and of the head; the paper found batch norm best."""
    expand_from: Literal["output", "input"] = "output"
    """MBConv's hidden width: 4 x its output (CoAtNet's code) or 4 x its input (the paper's text)."""
    pool: Literal["avg", "max"] = "avg"
    """The pooling of the downsampling shortcuts, and of the attention's input where S4 (or S3) halves the map."""
    head: Literal["avg", "gem", "attention"] = "avg"
    """How the last map becomes logits: its mean, a generalised mean, or attention over time."""
    activation: Literal["gelu", "gelu_tanh", "silu", "hard_swish", "relu"] = "gelu"
    """Everywhere but in squeeze-excitation. gelu_tanh is within 0.0005 of gelu, and cheaper on a CPU; hard_swish (MobileNetV3's) more so."""


class GeluTanh(nn.GELU):
    def __init__(self) -> None:
        super().__init__("tanh")


# widths of S1..S4, depths of S1..S4, widths of the stem's two layers, usual input side
VARIANTS = {
    "test": ((32, 64, 96, 128), (1, 1, 2, 1), (16, 32), 128),
    "pico": ((64, 128, 256, 512), (2, 3, 5, 2), (32, 64), 224),
    "nano": ((64, 128, 256, 512), (3, 4, 6, 3), (32, 64), 224),
    "tiny": ((80, 160, 320, 640), (2, 3, 5, 2), (40, 80), 224),
    "0": ((96, 192, 384, 768), (2, 3, 5, 2), (64, 64), 224),
    "1": ((96, 192, 384, 768), (2, 6, 14, 2), (64, 64), 224),
}
HEAD_WIDTH = 32  # channels per attention head
ACTIVATIONS = {"gelu": nn.GELU, "gelu_tanh": GeluTanh, "silu": nn.SiLU, "hard_swish": nn.Hardswish, "relu": nn.ReLU}


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is left out with probability `rate`, else scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        return x * torch.empty(x.shape[0], 1, 1, 1, device=x.device, dtype=x.dtype).bernoulli_(1 - self.rate).div_(1 - self.rate)


class NormAct(nn.BatchNorm2d):
    """Batch norm with an activation behind it; the activation has no parameters, so the names are batch norm's."""

    def __init__(self, width: int, activation: type[nn.Module] | None) -> None:
        super().__init__(width)
        self.act = activation() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def norm2d(kind: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width, eps=1e-6) if kind == "bn" else LayerNorm2d(width, eps=1e-6)


class Downsample(nn.Module):
    """Halves the map by pooling (where `stride` is 2) and widens it by a 1x1 convolution (where the widths differ)."""

    def __init__(self, width_in: int, width_out: int, stride: int, pool: str) -> None:
        super().__init__()
        pooling = {"avg": nn.AvgPool2d, "max": nn.MaxPool2d}[pool]
        self.pool = pooling(2) if stride == 2 else nn.Identity()
        self.expand = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.expand(self.pool(x))


class SqueezeExcite(nn.Module):
    """Channel attention: each channel is scaled by a gate computed from all channels' means."""

    def __init__(self, width: int, reduced: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.silu(self.fc1(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class Stem(nn.Module):
    """S0: two 3x3 convolutions, the first with stride 2: (B, 1, S, S) -> (B, width, S/2, S/2)."""

    def __init__(self, widths: tuple[int, int], activation: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False)
        self.norm1 = NormAct(widths[0], activation)
        self.conv2 = nn.Conv2d(widths[0], widths[1], 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.norm1(self.conv1(x)))


class MBConv(nn.Module):
    """C: norm, 1x1 expansion by 4, 3x3 depthwise (strided), squeeze-excitation, 1x1 projection, residual."""

    def __init__(self, width_in: int, width_out: int, stride: int, drop_path: float, settings: AscaSettings) -> None:
        super().__init__()
        activation = ACTIVATIONS[settings.activation]
        base = width_out if settings.expand_from == "output" else width_in
        hidden = 4 * base
        same = stride == 1 and width_in == width_out
        self.shortcut = nn.Identity() if same else Downsample(width_in, width_out, stride, settings.pool)
        self.pre_norm = NormAct(width_in, None)
        self.conv1_1x1 = nn.Conv2d(width_in, hidden, 1, bias=False)
        self.norm1 = NormAct(hidden, activation)
        self.conv2_kxk = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False)
        self.norm2 = NormAct(hidden, activation)
        self.se = SqueezeExcite(hidden, base // 4)
        self.conv3_1x1 = nn.Conv2d(hidden, width_out, 1)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1_1x1(self.pre_norm(x)))
        y = self.conv3_1x1(self.se(self.norm2(self.conv2_kxk(y))))
        return self.shortcut(x) + self.drop_path(y)


def _relative_index(side: int) -> Tensor:
    """(tokens, tokens): for each pair i, j of a side x side map, the number of its distance i - j."""
    place = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)  # (2, tokens)
    distance = place[:, :, None] - place[:, None, :] + side - 1  # (2, tokens, tokens), from 0
    return distance[0] * (2 * side - 1) + distance[1]


class RelativeBias(nn.Module):
    """w_{i-j}: one learnt number for each distance and head (equation 3)."""

    def __init__(self, side: int, heads: int) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * side - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", _relative_index(side), persistent=False)

    def forward(self) -> Tensor:
        """(1, heads, tokens, tokens)"""
        return self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)


class RelativeMlp(nn.Module):
    """w_{i-j} from a two-layer network of the signed log distance (as timm's RelPosMlp, mode cr); ours."""

    def __init__(self, side: int, heads: int, hidden: int = 512) -> None:
        super().__init__()
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(2, hidden), act=nn.ReLU(), fc2=nn.Linear(hidden, heads)))
        steps = torch.arange(1.0 - side, side)
        steps = steps.sign() * (1 + steps.abs()).log()
        self.register_buffer("distances", torch.cartesian_prod(steps, steps), persistent=False)  # ((2 side - 1)^2, 2)
        self.register_buffer("relative_position_index", _relative_index(side), persistent=False)

    def forward(self) -> Tensor:
        return self.mlp(self.distances)[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)


class RelativeAttention(nn.Module):
    """Equation 1 per head, with projections and a scale: softmax_j(q_i . k_j / sqrt(d) + w_{i-j}) v_j."""

    def __init__(self, width_in: int, width_out: int, side: int, rel_pos: str) -> None:
        super().__init__()
        self.heads = width_out // HEAD_WIDTH
        self.qkv = nn.Conv2d(width_in, 3 * width_out, 1)
        self.rel_pos = {"bias": RelativeBias, "mlp": RelativeMlp}[rel_pos](side, self.heads) if rel_pos != "none" else None
        self.proj = nn.Conv2d(width_out, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        q, k, v = self.qkv(x).view(batch, self.heads, 3 * HEAD_WIDTH, height * width).transpose(2, 3).chunk(3, dim=3)
        bias = None if self.rel_pos is None else self.rel_pos().to(q.dtype)
        y = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), attn_mask=bias)
        return self.proj(y.transpose(2, 3).reshape(batch, -1, height, width))


class Mlp(nn.Module):
    def __init__(self, width: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Conv2d(width, 4 * width, 1), activation(), nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class NormDown(nn.Module):
    """Norm, then pooling where the block has stride 2."""

    def __init__(self, norm: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.norm, self.down = norm, down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(x))


class Transformer(nn.Module):
    """T: pre-norm relative attention and a pre-norm MLP (expansion 4), each with a residual."""

    def __init__(self, width_in: int, width_out: int, stride: int, drop_path: float, settings: AscaSettings, side: int) -> None:
        super().__init__()
        norm = norm2d(settings.attn_norm, width_in)
        if stride == 1 and width_in == width_out:
            self.shortcut, self.norm1 = nn.Identity(), norm
        else:
            self.shortcut = Downsample(width_in, width_out, stride, settings.pool)
            self.norm1 = NormDown(norm, Downsample(width_in, width_in, stride, settings.pool))
        self.attn = RelativeAttention(width_in, width_out, side, settings.rel_pos)
        self.norm2 = norm2d(settings.attn_norm, width_out)
        self.mlp = Mlp(width_out, ACTIVATIONS[settings.activation])
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shortcut(x) + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Stage(nn.Module):
    """S1..S4: `depth` blocks of one kind; the first halves the map, unless `stride` is 1."""

    def __init__(self, kind: str, width_in: int, width_out: int, stride: int, rates: list[float], settings: AscaSettings,
                 side: int) -> None:
        super().__init__()
        self.side = side  # of the map that enters the blocks; another one is resized to it
        blocks = []
        for number, rate in enumerate(rates):
            width, step = (width_in, stride) if number == 0 else (width_out, 1)
            blocks.append(MBConv(width, width_out, step, rate, settings) if kind == "C"
                          else Transformer(width, width_out, step, rate, settings, side // stride))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.side:  # S4's alone: attn_patch 7 and 14 (figure 3); the paper is silent on how: ours
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return self.blocks(x)


class ASCA(nn.Module):
    """(B, 1, side, side) normalised spectrogram -> (B, n_classes) logits. Raises ValueError for an unusable side, and for an input of another one."""

    def __init__(self, variant: str, n_classes: int, *, side: int | None = None, drop_path: float = 0.2,
                 settings: AscaSettings = AscaSettings()) -> None:
        super().__init__()
        widths, depths, stem_widths, usual_side = VARIANTS[variant]
        side = side or usual_side
        if side < 32 or side % 32:
            raise ValueError(f"ASCA halves its input five times: the side must be a multiple of 32, not {side}")
        self.side = side
        tokens = round(side / settings.attn_patch)  # a row of S4's tokens
        stride = 2 if settings.attn_patch == 32 else 1  # of S4
        self.stem = Stem(stem_widths, ACTIVATIONS[settings.activation])
        rates = torch.linspace(0, drop_path, sum(depths), device="cpu").split(depths)
        width_in, stages = stem_widths[1], []
        for number, (kind, width) in enumerate(zip(settings.layout, widths)):
            last = number == 3
            stages.append(Stage(kind, width_in, width, stride if last else 2, rates[number].tolist(), settings,
                                side=tokens * stride if last else side >> (number + 1)))
            width_in = width
        self.stages = nn.Sequential(*stages)
        self.norm = norm2d(settings.attn_norm, width_in)
        self.head = HEADS[settings.head](width_in, n_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:] != (self.side, self.side):
            raise ValueError(f"this ASCA was made for {self.side} x {self.side}, not {x.shape[-2]} x {x.shape[-1]}")
        return self.head(self.norm(self.stages(self.stem(x))))


def _initialise(module: nn.Module) -> None:
    """EfficientNet's for depthwise and stem convolutions, Xavier's uniform for all that multiplies channels; ours."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
        if isinstance(module, nn.Conv2d) and module.kernel_size[0] > 1:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.groups > 1:
                module.weight.data.mul_(module.groups**0.5)  # torch counts a depthwise layer's fan over all groups
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
