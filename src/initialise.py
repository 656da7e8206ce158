"""Where a network's weights begin (the paper's figure 2): a checkpoint file, as timm's networks are kept in, or another run of this project.

From a file, whatever has the name and shape of one of the network's tensors is taken over. timm's names are ASCA's, and those of the
rivals that timm builds; AST's and PSLA's trunks carry theirs behind a prefix. A first convolution over three colours is summed to one
channel (as timm does), and a table of positions for a map of another size is resized (bicubic; AST's authors cut it or resize it
bilinearly). What depends on the number of classes stays fresh, and so does a numbered block of which less than half fits, since its
rest belongs to another kind of block: an attention block of CoAtNet's S3 shares no more than its shortcut with ASCA's. timm's trained
`coatnet_*_rw` differ from CoAtNet in ways that no name shows (an activation behind the first norm, SiLU, pooling before the
convolution), so their weights are a start, no more.

From a run (pre-training on other classes) everything but the head is taken over, and it has to be the same network up to the head.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from .augment import tell_heard
from .checkpoint import load_tensors
from .config import AudioConfig, differences
from .console import UserError, say
from .folds import read_folds
from .metadata import read_csv, read_metadata, recording_id
from .models import create_model
from .models.asca import AscaSettings
from .run_config import comparable, read_config
from .settings import flatten
from .storage import fold_folders, sha256
from .train_settings import TrainSettings

PREFIXES = ("network.", "network.vit.", "network.trunk.", "")  # a timm-like network, AST's trunk, PSLA's trunk, a whole model of ours
POSITIONS = ("relative_position_bias_table", "pos_embed")
LISTED = 4  # names in an error


def initialise(model: nn.Module, settings: TrainSettings, *, fold: int, classes: Sequence[str], audio: AudioConfig,
               held_out: Collection[str]) -> dict[str, Any]:
    """Fills the model from `settings.init` and says with what. Returns the facts for config.yaml: the file's SHA-256, and the recipe's
    where it is a run's. Raises UserError for a file that is damaged or fits nowhere, another network's run, or one that knows a held-out recording."""
    file, folder = weights_of(settings.init, fold)
    head, config = head_of(model, settings, len(classes), audio), read_config(folder) if folder else None
    if config:
        require_same_network(folder, config, settings, audio)
        require_unheard(folder, config, held_out)
        head = set() if config["classes"] == list(classes) else head
    tensors = load_tensors(file)[0] if folder else read_checkpoint(file)
    if config and config["settings"].get("head") != settings.network.asca.head:
        head |= {name for name, tensor in model.state_dict().items()
                 if name.startswith("network.head.") and (name not in tensors or tensors[name].shape != tensor.shape)}
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in head and not name.endswith("num_batches_tracked")}
    prefix, fitting = fit(tensors, wanted)
    if not fitting or (folder and len(fitting) < len(wanted)):
        absent = next(name for name in wanted if name not in fitting)
        raise UserError(f"{file} does not fit {settings.model}: {len(fitting)} of its {len(wanted)} tensors are there; missing is {absent}, "
                        f"there is {', '.join(list(tensors)[:LISTED]) or 'nothing'}; name a checkpoint of the same architecture")
    model.load_state_dict(model.state_dict() | fitting)
    report(file, wanted, fitting, head, list(tensors), prefix)
    recipe = hashlib.sha256(json.dumps(comparable(config, between_folds=True), sort_keys=True).encode()).hexdigest() if config else None
    return {"sha256": sha256(file), "recipe_sha256": recipe}


def weights_of(init: Path, fold: int) -> tuple[Path, Path | None]:
    """The weights file, and its fold folder where it is a run's: that of the same number, else the run's only one."""
    if not init.exists():
        raise UserError(f"--init {init} does not exist; docs/training.md says how to obtain a checkpoint")
    if init.is_file():
        ours = init.name == "weights.safetensors" and (init.parent / "config.yaml").exists()
        return init, init.parent if ours else None
    folders = [init] if (init / "weights.safetensors").exists() else fold_folders(init, "weights.safetensors")
    same = [folder for folder in folders if folder.name == f"fold{fold}"]
    if len(same or folders) != 1:
        found = f"the folds {', '.join(folder.name for folder in folders)}, but not fold{fold}" if folders else "no finished fold"
        raise UserError(f"--init {init} holds {found}; name a checkpoint file, a run or one of its fold folders")
    folder = (same or folders)[0]
    return folder / "weights.safetensors", folder


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth or .bin file of which nothing is executed; common wrappings are opened."""
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged pickle brings about
        raise UserError(f"{file} is damaged, or holds more than tensors and is not loaded for safety; a .safetensors file holds tensors alone "
                        f"({type(error).__name__})") from error
    for wrapping in ("state_dict_ema", "state_dict", "model_ema", "model"):
        found = found[wrapping] if isinstance(found, dict) and isinstance(found.get(wrapping), dict) else found
    tensors = {name.removeprefix("module."): tensor.float() for name, tensor in (found.items() if isinstance(found, dict) else ())
               if isinstance(name, str) and isinstance(tensor, Tensor)}
    wrong = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if wrong:
        raise UserError(f"{file} is damaged: {wrong[0]} holds what is no number; obtain it again")
    return tensors


def head_of(model: nn.Module, settings: TrainSettings, n_classes: int, audio: AudioConfig) -> set[str]:
    """The tensors whose shape depends on the number of classes."""
    with torch.device("meta"):
        other = create_model(settings.model, n_classes + 1, audio, settings.network).state_dict()
    return {name for name, tensor in model.state_dict().items() if tensor.shape != other[name].shape}


def require_same_network(folder: Path, config: dict, settings: TrainSettings, audio: AudioConfig) -> None:
    keys = {"model", "input_norm"} | (set(AscaSettings.__dataclass_fields__) - {"head"} if settings.model.startswith("asca") else set())
    here, there = flatten(settings), config["settings"]
    changed = differences({key: there.get(key) for key in keys}, {key: here[key] for key in keys})
    if changed:
        raise UserError(f"{folder} holds another network ({'; '.join(changed)}); a training begins from a run of the same one")
    if heard := differences(config["audio"], audio.to_dict()):
        say(f"mind that {folder} was trained on other log-mels ({'; '.join(heard)})")


def require_unheard(folder: Path, config: dict, held_out: Collection[str]) -> None:
    """Refuses a run that was trained on a recording which is held out here, or began from one that was: it would be scored on what it knows."""
    settings = config["settings"]
    try:
        known = set(read_metadata(tuple(map(Path, settings["data"])), settings["metadata"]).table.filename)
    except UserError as error:
        say(f"cannot check that {folder} never heard the held-out recordings: {error}")
        return
    never = set(read_csv(folder / "oof.csv").filename)
    with contextlib.suppress(UserError):  # without the table of its folds, what it left out counts as heard
        never |= {name for name, of in read_folds(Path(settings["folds"])).items() if of == -2}
    heard = sorted(set(map(recording_id, held_out)) & set(map(recording_id, known - never)))
    if heard:
        raise UserError(f"{folder} was trained on {len(heard)} of the recordings held out here, {heard[0]} for one: the scores would be too good; "
                        "begin from a fold that held them out, or from a run on other recordings")
    if settings["noise"]:
        tell_heard(Path(settings["noise"]), held_out)
    if settings.get("init"):
        try:
            earlier = weights_of(Path(settings["init"]), int(settings["fold"][0]))[1]
        except UserError as error:
            say(f"cannot check what {folder} began from: {error}")
            return
        if earlier:
            require_unheard(earlier, read_config(earlier), held_out)


def fit(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The prefix that finds most, and wanted name -> the checkpoint's tensor in the wanted shape, without the blocks that fit by less than half."""
    chosen, best = "", {}
    for prefix in PREFIXES:
        found = {name: in_shape(name, tensors[name.removeprefix(prefix)], like.shape) for name, like in wanted.items()
                 if name.startswith(prefix) and name.removeprefix(prefix) in tensors}
        chosen, best = max((chosen, best), (prefix, {name: tensor for name, tensor in found.items() if tensor is not None}), key=lambda pair: size(pair[1]))
    whole, part = Counter(), Counter()
    for name, like in wanted.items():
        whole[block_of(name)] += like.numel()
        part[block_of(name)] += like.numel() if name in best else 0
    return chosen, {name: tensor for name, tensor in best.items() if 2 * part[block_of(name)] >= whole[block_of(name)]}


def block_of(name: str) -> str:
    """network.stages.2.blocks.0.norm1.weight -> network.stages.2.blocks.0; a tensor of no numbered block is one by itself."""
    return match[0] if (match := re.match(r".*\.\d+(?=\.)", name)) else name


def size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def in_shape(name: str, tensor: Tensor, shape: torch.Size) -> Tensor | None:
    """The tensor in this shape, if that can be done without loss of sense, else None."""
    if tensor.shape == shape:
        return tensor
    if len(shape) == 4 and shape[1] == 1 and tensor.shape == (shape[0], 3, *shape[2:]):  # a spectrogram is three equal colours
        return tensor.sum(1, keepdim=True)
    return resized(tensor, shape) if name.endswith(POSITIONS) and tensor.ndim == len(shape) and tensor.shape[-1] == shape[-1] else None


def resized(table: Tensor, shape: torch.Size) -> Tensor | None:
    """(..., extra + side^2, width) -> another side, bicubic; the extra rows (class and distillation tokens) stay. None where their numbers differ."""
    rows, width, cells = table.reshape(-1, table.shape[-1]), shape[-1], shape[-2]
    before, after = math.isqrt(len(rows)), math.isqrt(cells)
    extra = len(rows) - before**2
    if extra != cells - after**2:
        return None
    grid = rows[extra:].T.reshape(1, width, before, before)
    grid = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False).reshape(width, after**2).T
    return torch.cat([rows[:extra], grid]).reshape(shape)


def report(file: Path, wanted: dict[str, Tensor], fitting: dict[str, Tensor], head: set[str], given: Sequence[str], prefix: str) -> None:
    """Says stage by stage how much was mapped, and block by block what stays fresh and what of the file is not taken."""
    short = {name: re.sub(r"^network\.(vit\.|trunk\.)?", "", name) for name in [*wanted, *head]}
    stage_of = {name: re.match(r"[^.]+(\.\d+)?", rest)[0] for name, rest in short.items()}
    whole, mapped = Counter(stage_of[name] for name in wanted), Counter(stage_of[name] for name in fitting)
    say(f"the weights begin from {file}: {len(fitting)} of {len(wanted)} tensors, {size(fitting) / 1e6:.2f} of {size(wanted) / 1e6:.2f} M values "
        f"(the file holds {len(given)} tensors): " + ", ".join(f"{stage} {mapped[stage]}/{n}" for stage, n in whole.items()))
    used = {name.removeprefix(prefix) for name in fitting}
    fresh = sorted(short[name] for name in [*wanted, *head] if name not in fitting)
    unused = [name for name in sorted(given) if name not in used and not name.endswith("num_batches_tracked")]
    for what, names, everything in (("fresh weights", fresh, short.values()), ("not taken from the file", unused, given)):
        if names:
            say(f"{what}: {', '.join(by_block(names, everything))}")


def by_block(names: Iterable[str], everything: Iterable[str]) -> list[str]:
    """A block's name alone where `names` holds all of it, else with what of it; the rest tensor by tensor."""
    blocks, sizes = defaultdict(list), Counter(map(block_of, everything))
    for name in names:
        blocks[block_of(name)].append(name.removeprefix(block_of(name) + "."))
    return [block if len(members) == sizes[block] else f"{block} ({' '.join(members)})" for block, members in blocks.items()]
