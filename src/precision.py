"""What OpenVINO changes in a run's held-out windows: measured against onnxruntime, stored beside each model, refused beyond a bound."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import torch
import tyro

from . import engines, metrics
from .cache import Cache
from .console import UserError, progress, say, stage, usable_cores
from .dataset import HeldOutWindows, to_log_mel
from .engines import MACRO_AP_BOUND, Engine
from .evaluate import open_cache, out_of_fold, truth_of
from .folds import read_folds
from .onnx_models import OnnxModel, find_models, load_model
from .settings import parse
from .storage import atomic_folder, owned_file, write_json

F32_BOUND = 1e-5  # of any probability: rounding, no more
BATCH = 32  # windows


@dataclass(frozen=True)
class PrecisionSettings:
    run: Path = Path("runs/asca")
    precision: Literal["f32", "bf16", "int8"] = "bf16"
    """int8 is calibrated on recordings that the fold trained on, by NNCF."""
    data: Annotated[tuple[Path, ...], tyro.conf.arg(help_behavior_hint="(default: the run's)")] = ()
    """Where the metadata lie, if no longer where they lay when the run was trained."""
    metadata: Path | None = None
    """Another table in train_metadata.csv's columns, if not the run's."""
    cache: Path | None = None
    """By default where it lay when the run was trained."""
    calibration_windows: Annotated[int, tyro.conf.arg(help="At least 1.")] = 128
    threads: int = 0
    """0: all cores."""


def windows_of(names: list[str], cache: Cache, *, only_first: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Recordings' windows (n, frames, n_mels) uint8, and each one's place among the names."""
    windows = HeldOutWindows(names, cache, only_first=only_first)
    pairs = [windows[item] for item in range(len(windows))]
    return np.stack([window for window, _ in pairs]), np.array([place for _, place in pairs])


def decibels(windows: np.ndarray, cache: Cache) -> np.ndarray:
    return to_log_mel(torch.from_numpy(windows), cache.config).numpy()


def probabilities(model: OnnxModel, windows: np.ndarray, cache: Cache, what: str) -> np.ndarray:
    """(n windows, C)"""
    starts = range(0, len(windows), BATCH)
    return np.concatenate([model.probabilities(decibels(windows[start : start + BATCH], cache)) for start in progress(starts, what=what)])


def quantise(model: Path, windows: np.ndarray, cache: Cache) -> None:
    """model.onnx -> its int8 form for OpenVINO, with the ranges of activations that these windows show.

    Matrix products (the resize of the input, attention) stay in float32, activations may be asymmetric, and NNCF smooths outliers
    (its "transformer" scheme): NNCF's defaults change the probabilities far more.
    """
    openvino = engines.openvino()  # first: it silences the statistics of both packages
    try:
        import nncf
    except ImportError:
        raise UserError(f"--precision int8 needs NNCF for calibration; run {engines.INSTALL}") from None
    samples = [decibels(window[None], cache) for window in windows]
    quantised = nncf.quantize(openvino.Core().read_model(model), nncf.Dataset(samples), subset_size=len(samples), model_type=nncf.ModelType.TRANSFORMER,
                              preset=nncf.QuantizationPreset.MIXED, ignored_scope=nncf.IgnoredScope(types=["MatMul"], validate=False))
    final = engines.quantised_path(model)
    with atomic_folder(final.parent) as partial:
        openvino.save_model(quantised, partial / final.name, compress_to_fp16=False)


def macro_ap(truth: np.ndarray, probability: np.ndarray) -> float:
    """Over the classes that have a held-out positive."""
    return float(np.nanmean(metrics.per_class(truth, probability)[0]))


def compare(reference: np.ndarray, candidate: np.ndarray, places: np.ndarray, truth: np.ndarray, *, lossy: bool) -> dict:
    """The change of the windows' probabilities (n, C), and of the macro AP of the recordings' means; whether both are within bounds."""
    before, after = (macro_ap(truth, pd.DataFrame(p).groupby(places).mean().to_numpy()) for p in (reference, candidate))
    change = np.abs(candidate - reference)
    accepted = abs(after - before) <= MACRO_AP_BOUND and (lossy or change.max() <= F32_BOUND)
    return {"largest_change": float(change.max()), "mean_change": float(change.mean()), "macro_ap_f32": before, "macro_ap": after,
            "macro_ap_change": after - before, "accepted": bool(accepted and np.isfinite(candidate).all())}


@stage
def main(argv: list[str] | None = None) -> int:
    settings = parse(PrecisionSettings, argv, prog="python -m src.precision", description=__doc__)
    engine = engines.choose("openvino", settings.precision)
    threads = settings.threads or usable_cores()
    if settings.calibration_windows < 1:
        raise UserError(f"--calibration-windows {settings.calibration_windows}: it is at least 1")
    folds, metadata, config = out_of_fold(settings.run, settings.data, settings.metadata)
    cache, why_not = open_cache(settings.cache, config)
    if cache is None:
        raise UserError(f"the held-out windows come from the cache: {why_not}")
    say(f"{settings.run}: {len(folds)} fold(s), {engine} against {Engine()} on {threads} thread(s)")
    models, refused = find_models([settings.run], threads), 0
    unknown = [model.path for model in models if int(model.path.parent.name[4:]) not in folds]
    if unknown:
        raise UserError(f"{unknown[0]} stands without its weights, so what it held out is not known; copy the whole fold here or move the model away")
    table = Path(config["settings"]["folds"])
    left_out = {name for name, fold in (read_folds(table) if table.exists() else {}).items() if fold == -2}
    for model in models:
        fold = model.path.parent.name
        held_out, verdict = folds[int(fold[4:])].filename, engines.verdict_path(model.path, engine)
        with owned_file(verdict):
            if engine.precision == "int8":
                trained = metadata.table.filename[~metadata.table.filename.isin({*held_out, *left_out}) & metadata.table.filename.isin(cache.names)].tolist()
                chosen = trained[:: max(1, len(trained) // settings.calibration_windows)][: settings.calibration_windows]
                quantise(model.path, windows_of(chosen, cache, only_first=True)[0], cache)
            windows, places = windows_of(held_out.tolist(), cache)
            facts = engines.facts(model.path, engine)
            reference, candidate = (probabilities(load_model(model.path, threads, one), windows, cache, f"{fold}: {one.name} {one.precision}")
                                    for one in (Engine(), engine))
            result = compare(reference, candidate, places, truth_of(held_out, metadata, config), lossy=engine.lossy)
            if engines.facts(model.path, engine) != facts:
                raise UserError(f"{model.path} changed while it was measured; run the same command again")
            write_json(verdict, {**facts, "windows": len(windows), **result})
        refused += not result["accepted"]
        say(f"{fold}: {len(windows)} held-out windows; probabilities change by {result['mean_change']:.1e} on average, {result['largest_change']:.1e} at most; "
            f"macro AP {result['macro_ap_f32']:.4f} -> {result['macro_ap']:.4f} ({result['macro_ap_change']:+.4f}, bound {MACRO_AP_BOUND}): "
            f"{'accepted' if result['accepted'] else 'REFUSED'}")
    return int(refused > 0)


if __name__ == "__main__":
    sys.exit(main())
