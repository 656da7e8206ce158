"""STAGE 5: runs/<run>/fold<k>/weights -> model.onnx (log_mel -> logits), with recipe, classes and prior; parity asserted."""

from __future__ import annotations

import copy
import json
import logging
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from scipy.special import expit
from torch import Tensor, nn

from .checkpoint import load_tensors
from .config import AudioConfig
from .console import UserError, resumable, say
from .dataset import to_log_mel
from .models import ModelSettings, create_model
from .models.asca import AscaSettings, MBConv
from .run_config import read_config
from .settings import parse
from .storage import atomic, fold_folders, owned_file, sha256, write_text

LOGIT_BOUND, PROBABILITY_BOUND = 1e-4, 1e-5  # the first times max(1, the largest logit)
OPSET = 20


@dataclass(frozen=True)
class ExportSettings:
    run: Path = Path("runs/asca")
    fold: tuple[str, ...] = ("all",)
    """One, several, or all that are trained."""


def load_model(folder: Path) -> tuple[nn.Module, dict]:
    """A fold's trained network in eval mode, and its config."""
    config = read_config(folder)
    settings = config["settings"]
    pick = {name: settings[name] for cls in (ModelSettings, AscaSettings) for name in cls.__dataclass_fields__ if name in settings}
    asca = AscaSettings(**{name: pick.pop(name) for name in AscaSettings.__dataclass_fields__ if name in pick})
    model = create_model(settings["model"], len(config["classes"]), AudioConfig.from_dict(config["audio"]), ModelSettings(**pick, asca=asca))
    tensors, _ = load_tensors(folder / "weights.safetensors")
    try:
        model.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise UserError(f"{folder / 'weights.safetensors'} does not fit {folder / 'config.yaml'}: {str(error)[:300]}") from error
    return model.eval(), config


def fold_pre_norms(model: nn.Module) -> nn.Module:
    """A copy in eval mode with MBConv's first norm inside the 1x1 convolution behind it: W (s x + t) = (W s) x + W t, where W t goes to the
    mean of the next norm. Exact but for rounding. onnxruntime folds the norms behind convolutions itself, but computes those ahead of them."""
    folded = copy.deepcopy(model).eval()
    with torch.no_grad():
        for block in folded.modules():
            if isinstance(block, MBConv):
                norm, following, weight = block.pre_norm, block.norm1, block.conv1_1x1.weight.double()  # (hidden, width, 1, 1)
                scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
                shift = norm.bias.double() - norm.running_mean.double() * scale
                following.running_mean.copy_(following.running_mean.double() - weight[:, :, 0, 0] @ shift)
                block.conv1_1x1.weight.copy_(weight * scale[None, :, None, None])
                block.pre_norm = nn.Identity()
    return folded


def write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """The graph log_mel (batch, 1, n_mels, window_frames) -> logits (batch, n_classes), one file, any batch."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own deprecations; what counts, the result, is compared below
        torch.onnx.export(fold_pre_norms(model), (example,), path, dynamo=True, opset_version=OPSET, external_data=False, verbose=False,
                          input_names=["log_mel"], output_names=["logits"], dynamic_shapes={"log_mel": {0: torch.export.Dim("batch")}})


def assert_parity(model: nn.Module, path: Path, log_mel: Tensor) -> tuple[float, float]:
    """The largest differences of logits and probabilities between torch and onnxruntime, at batches of 1, 3 and all.

    Raises UserError where one is beyond its bound, or a logit is not finite. The bounds widen for a network that torch itself cannot
    compute more exactly in float32: to twice its own distance from float64.
    """
    with torch.inference_mode():
        expected = model(log_mel).numpy()
        exact = copy.deepcopy(model).double()(log_mel.double()).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst_logit = worst_probability = 0.0
    for batch in (1, 3, len(log_mel)):
        actual = session.run(["logits"], {"log_mel": log_mel[:batch].numpy()})[0]
        worst_logit = max(worst_logit, float(np.abs(actual - expected[:batch]).max()))
        worst_probability = max(worst_probability, float(np.abs(expit(actual) - expit(expected[:batch])).max()))
    bound = max(LOGIT_BOUND * max(1.0, float(np.abs(expected).max())), 2 * float(np.abs(expected - exact).max()))
    probability_bound = max(PROBABILITY_BOUND, 2 * float(np.abs(expit(expected) - expit(exact)).max()))
    if not (worst_logit <= bound and worst_probability <= probability_bound):
        raise UserError(f"{path.name.removesuffix('.partial')}: onnxruntime differs from torch by {worst_logit:.2g} in the logits (bound {bound:.2g}) and "
                        f"{worst_probability:.2g} in the probabilities (bound {probability_bound:.0e}); the model was not exported")
    return worst_logit, worst_probability


def export_fold(folder: Path) -> None:
    """Writes model.onnx and model.onnx.sha256, unless they are there and made from these very weights."""
    out, digest = folder / "model.onnx", sha256(folder / "weights.safetensors")
    if out.exists() and (folder / "model.onnx.sha256").exists():
        facts = {p.key: p.value for p in onnx.load(out).metadata_props} if _unchanged(out) else {}
        if facts.get("weights_sha256") == digest:
            say(f"{out} is up to date")
            return
    model, config = load_model(folder)
    audio = AudioConfig.from_dict(config["audio"])
    windows, _ = load_tensors(folder / "golden_windows.safetensors")
    log_mel = to_log_mel(windows["windows"], audio)
    with owned_file(out):
        with atomic(out) as partial:
            write_onnx(model, log_mel[:2] if len(log_mel) > 1 else log_mel.repeat(2, 1, 1, 1), partial)
            graph = onnx.load(partial)
            onnx.helper.set_model_props(graph, {
                "audio": json.dumps(config["audio"]), "classes": json.dumps(config["classes"]), "prior": json.dumps(config["prior"]),
                "model": config["settings"]["model"], "weights_sha256": digest})
            forget_origin(graph.graph)
            onnx.save(graph, partial)
            logit, probability = assert_parity(model, partial, log_mel)
        write_text(folder / "model.onnx.sha256", f"{sha256(out)}  model.onnx\n")
    say(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB): within {logit:.1e} (logits) and {probability:.1e} (probabilities) "
        f"of torch on {len(log_mel)} held-out windows")


def forget_origin(graph: onnx.GraphProto) -> None:
    """Takes out what torch notes of its source on every node: the paths of whoever exported would travel with the model, and the same
    weights would give another file in another folder."""
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


def _unchanged(out: Path) -> bool:
    return (out.parent / "model.onnx.sha256").read_text(encoding="utf-8").split()[:1] == [sha256(out)]


@resumable
def main(argv: list[str] | None = None) -> None:
    settings = parse(ExportSettings, argv, prog="python -m src.export", description=__doc__)
    trained = {folder.name.removeprefix("fold"): folder for folder in fold_folders(settings.run, "weights.safetensors")}
    if not trained:
        raise UserError(f"{settings.run} holds no finished fold; train one with python -m src.train --run {settings.run}")
    wanted = list(trained) if settings.fold == ("all",) else list(settings.fold)
    absent = [fold for fold in wanted if fold not in trained]
    if absent:
        raise UserError(f"fold {absent[0]} of {settings.run} is not finished; finished: {', '.join(trained)}")
    for fold in wanted:
        export_fold(trained[fold])


if __name__ == "__main__":
    sys.exit(main())
