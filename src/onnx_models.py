"""Exported folds: opened after their SHA-256 is checked, and exported first where they are not. Without torch."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from scipy.special import expit

from .config import AudioConfig
from .console import UserError
from .engines import Engine, Runner, open_runner, require_verdict
from .storage import fold_folders, sha256


@dataclass(frozen=True)
class OnnxModel:
    """One exported fold: probabilities from log-mel windows, and the facts that its file carries."""

    path: Path
    run: Runner
    audio: AudioConfig
    classes: tuple[str, ...]
    prior: np.ndarray  # (n_classes,), in the order of `classes`
    weights_sha256: str = ""  # of the weights that it was exported from

    def probabilities(self, log_mel: np.ndarray, options: onnxruntime.RunOptions | None = None) -> np.ndarray:
        """(B, 1, n_mels, window_frames) float32 dB -> (B, n_classes)."""
        return expit(self.run(log_mel, options))


def load_model(path: Path, threads: int, engine: Engine = Engine()) -> OnnxModel:
    """Opens a model.onnx. Raises UserError where the file differs from its SHA-256 or lacks its facts."""
    digest = path.with_name(path.name + ".sha256")
    if not digest.exists() or digest.read_text(encoding="utf-8", errors="replace").split()[:1] != [sha256(path)]:
        raise UserError(f"{path} is damaged or not the exported file: its SHA-256 is not the one in {digest.name}; "
                        f"delete it and run python -m src.export --run {path.parent.parent}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # the engine runs as many windows side by side as there are threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    try:
        return OnnxModel(path, open_runner(path, session, engine, threads), AudioConfig.from_dict(facts["audio"]), tuple(json.loads(facts["classes"])),
                         np.array(json.loads(facts["prior"]), np.float32), facts.get("weights_sha256", ""))
    except (KeyError, ValueError) as error:
        raise UserError(f"{path} carries no recipe and classes ({error}); export it with python -m src.export") from error


def find_models(runs: Sequence[Path], threads: int, engine: Engine = Engine()) -> list[OnnxModel]:
    """Every fold's model of the runs; what is not exported yet is exported first, where torch is installed.

    Raises UserError for a lossy precision that src.precision has not measured and accepted.
    """
    models = []
    for run in runs:
        folders = fold_folders(run, "model.onnx", "weights.safetensors")
        if not folders:
            raise UserError(f"{run} holds no trained fold; train one with python -m src.train --run {run}")
        of_run = [_open(folder, threads, engine) for folder in folders]
        if any(model is None for model in of_run):
            command = [sys.executable, "-m", "src.export", "--run", str(run)]
            if importlib.util.find_spec("torch") is None:
                raise UserError(f"{run} is not exported; run python -m src.export --run {run} where torch is installed")
            if subprocess.run(command).returncode:
                raise UserError(f"python -m src.export --run {run} failed")
            of_run = [model or _open(folder, threads, engine) for folder, model in zip(folders, of_run)]
        models += of_run
    for model in models[1:]:
        if set(model.classes) != set(models[0].classes):
            raise UserError(f"{model.path} and {models[0].path} know different species; name runs of the same classes")
    return models


def _open(folder: Path, threads: int, engine: Engine) -> OnnxModel | None:
    """The fold's model; None where it is missing or was made from other weights than the ones beside it."""
    path, weights = folder / "model.onnx", folder / "weights.safetensors"
    if not path.exists():
        return None
    if engine.lossy:
        require_verdict(path, engine)
    model = load_model(path, threads, engine)
    return None if weights.exists() and model.weights_sha256 != sha256(weights) else model
