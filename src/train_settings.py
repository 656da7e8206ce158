"""What a training can be told: the flags of src.train, and the keys of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .augment import AugmentSettings
from .losses import Loss
from .metadata import SecondaryLabels
from .models import ModelSettings
from .models.asca import AscaSettings

ON = tyro.conf.arg(help_behavior_hint="(on by default; this flag turns it off)")


@dataclass(frozen=True)
class TrainSettings:
    """The defaults are the recipe for small data, found by measurement (benchmarks/results/recipe.md)."""

    data: tuple[Path, ...] = (Path("input/birdclef-2023"),)
    """Folders in BirdCLEF's layout; further ones are always in training."""
    folds: Path | None = None
    """The fold table. By default folds.csv in the first data folder, if src.prepare made one, else folds/<that folder's name>.csv."""
    cache: Path | None = None
    """By default input/cache/<name of the first data folder>."""
    run: Path = Path("runs/asca")
    fold: tuple[str, ...] = ("0",)
    """One, several, or all."""
    metadata: Path | None = None
    """Another table in train_metadata.csv's columns for the first folder."""
    noise: Path | None = None
    """A folder of background noise, mixed in on the waveform path."""
    model: str = "asca_nano"
    init: Path | None = None
    """Where the weights begin: a checkpoint file (.safetensors, .pth, .bin), or another run's folder; by default from scratch."""
    epochs: int = 120
    batch_size: int = 32
    """Crops of one optimiser step, over all processes."""
    accumulate: int = 1
    """Work through a batch in so many parts, where the memory is small; batch norm and mixup see one part at a time."""
    learning_rate: float = 1e-3
    """At the end of the warm-up; a cosine takes it to 0."""
    warmup_epochs: float = 5.0
    """At most half of the epochs."""
    weight_decay: float = 0.05
    """AdamW's, on weights of two or more dimensions."""
    clip_gradient: float = 1.0
    """The gradient's largest norm; 0: not clipped."""
    ema_decay: float = 0.99
    """Of the moving average of the weights, which is then what is scored and kept; it warms up from 0. 0: off."""
    weight_noise: float = 0.0
    """Gaussian noise on the weights while a step's gradient is computed, as a share of each tensor's root mean square (section 4.2). 0: off."""
    loss: Loss = "bce"
    label_smoothing: float = 0.0
    """A target of 1 becomes 1 - smoothing."""
    sampling_power: float = 0.5
    """A recording is drawn in proportion to (class count / all)^-power; 0: all alike."""
    use_rating: bool = False
    """Draw well rated recordings more often."""
    secondary_labels: SecondaryLabels = "ignore"
    """ignore (the paper), mask (out of the loss), soft, or hard."""
    secondary_weight: float = 0.5
    """The target of a soft secondary label."""
    soft_labels: Path | None = None
    """Probabilities to train on beside the labels, from python -m src.distil."""
    soft_weight: float = 0.5
    """Of a soft label in a labelled recording's target; an unlabelled one's target is the soft label."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: bf16 on a GPU that has it, else fp16; fp32 on a CPU."""
    cuda_graphs: Annotated[bool, ON] = True
    """On one GPU the network's passes are recorded once and replayed, since small networks are otherwise bound by their launches.
    Not under --accumulate, where they are launched one by one."""
    compile: bool = False
    """torch.compile: minutes at the start, for long trainings on a GPU."""
    train_share: float = 1.0
    """Train on this share of the fold's training recordings: of each species, at least one; a smaller share lies within a larger one.
    An epoch stays as many crops as all of them would be, so that any share trains for as many steps."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, or cuda:1; several at once by accelerate launch or torchrun."""
    workers: int = -1
    """Loader processes; -1: none on a CPU, one a core (at most 16) beside a GPU."""
    threads: int = 0
    """Of the CPU, for each process; 0: all cores, shared by the processes."""
    pictures: Annotated[bool, ON] = True
    """curves.png and first_batch.png are drawn, which takes seconds a fold: many where the folds are many and short."""
    validate_every: int = 1
    """Score the held-out recordings after every so many epochs, and after the last: for epochs that are shorter than that."""
    checkpoint_seconds: float = 0.0
    """Save the state only after an epoch that ends so long after the last save: for short epochs of large networks. 0: after every one."""
    restart: bool = False
    """Begin anew, also where the run folder holds other settings."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    network: ModelSettings = field(default_factory=lambda: ModelSettings(drop_path=0.0, asca=AscaSettings(head="gem", attn_norm="bn",
                                                                                                          activation="gelu_tanh")))
