"""The deadline guard at work: time limits too short for a slow ensemble, and kill -9, each at random moments.

    python -m benchmarks.deadline [--limits 20] [--kills 20] [--seed 0]

Makes soundscapes and three slow models, and scores them as anyone would. Writes benchmarks/results/deadline.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
from onnx import TensorProto, helper, numpy_helper

from benchmarks.machine import about
from src import submission
from src.config import AudioConfig
from src.console import UserError, say, stage
from src.demo_data import noise, write_audio
from src.settings import parse
from src.soundscapes import find_soundscapes
from src.storage import sha256, write_text

CLASSES, PRIOR = ("demcuc1", "demdov1", "demowl1"), (0.125, 0.25, 0.0625)


@dataclass(frozen=True)
class DeadlineSettings:
    soundscapes: int = 3
    """Of 60 seconds."""
    layers: int = 5
    """Of each model: how slow it is."""
    limits: int = 20
    """Time limits, random fractions of what the whole job takes."""
    shortest: float = 0.3
    """The least fraction; Python and the models need some seconds before anything can be written."""
    kills: int = 20
    seed: int = 0
    out: Path = Path("benchmarks/results/deadline.md")


def slow_model(folder: Path, layers: int, seed: int = 0) -> None:
    """A model.onnx as src.export leaves it, whose 7 x 7 convolutions cost about 0.4 GFLOP a layer and window."""
    rng, nodes, tensors, name, channels = np.random.default_rng(seed), [], [], "log_mel", 1
    for layer in range(layers):
        weight = rng.standard_normal((8, channels, 7, 7)).astype(np.float32) / (7 * channels**0.5)
        tensors.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes += [helper.make_node("Conv", [name, f"w{layer}"], [f"c{layer}"], pads=[3, 3, 3, 3]), helper.make_node("Tanh", [f"c{layer}"], [f"t{layer}"])]
        name, channels = f"t{layer}", 8
    tensors.append(numpy_helper.from_array(rng.standard_normal((channels, len(CLASSES))).astype(np.float32), "head"))
    nodes += [helper.make_node("GlobalAveragePool", [name], ["pooled"]), helper.make_node("Flatten", ["pooled"], ["flat"]),
              helper.make_node("MatMul", ["flat", "head"], ["logits"])]
    audio = AudioConfig()
    graph = helper.make_graph(nodes, "slow", [helper.make_tensor_value_info("log_mel", TensorProto.FLOAT, ["batch", 1, audio.n_mels, audio.window_frames])],
                              [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(CLASSES)])], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"audio": json.dumps(audio.to_dict()), "classes": json.dumps(CLASSES), "prior": json.dumps(PRIOR)})
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    write_text(folder / "model.onnx.sha256", f"{sha256(folder / 'model.onnx')}  model.onnx\n")


def command(root: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "src.infer", "--run", str(root / "run"), "--soundscapes", str(root / "soundscapes"), "--out", str(root / "s.csv"),
            "--threads", "1", "--hop-seconds", "2.5", *flags]


def limited(root: Path, seconds: float) -> list[str]:
    return command(root, "--time-limit", str(seconds / 60), "--started", str(time.time()))


def verdict(root: Path) -> tuple[bool, int]:
    """Whether the submission is valid and complete, and how many of its rows a model scored."""
    ids = [row for s in find_soundscapes(root / "soundscapes", 60) for row in submission.row_ids(s.name, s.n_rows)]
    faults = submission.check(root / "s.csv", classes=CLASSES, ids=ids)
    rows = pd.read_csv(root / "s.csv", index_col="row_id").to_numpy() if not faults else np.empty((0, len(CLASSES)))
    return not faults, int((np.abs(rows - PRIOR).max(axis=1) > 1e-6).sum()) if len(rows) else 0


def last_plan(text: str) -> str:
    plans = [line.split(" left: ")[1] for line in text.splitlines() if line.startswith("deadline:")]
    return "; then ".join(plans) or "all"


def started(root: Path, words: list[str]) -> subprocess.Popen:
    """A run whose first submission stands."""
    (root / "s.csv").unlink(missing_ok=True)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (root / "s.csv").exists() and process.poll() is None:
        time.sleep(0.01)
    return process


OFTEN = "import sys; from src import infer, submission; submission.WRITE_EVERY = 0.2; sys.exit(infer.main(sys.argv[1:]))"


def killed(root: Path, after: float, seconds: float) -> tuple[bool, int] | None:
    """Starts a run that writes its rows as often as it may, kills it so many seconds after its first submission stands, and judges what is
    left; None where it had ended by then."""
    process = started(root, [sys.executable, "-c", OFTEN, *limited(root, seconds)[3:]])  # in the place of python -m src.infer
    time.sleep(after)
    alive = process.poll() is None
    process.kill()
    process.wait()
    return verdict(root) if alive else None


@stage
def main(argv: list[str] | None = None) -> int:
    settings = parse(DeadlineSettings, argv, prog="python -m benchmarks.deadline", description=__doc__)
    rng, load = np.random.default_rng(settings.seed), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(3):
            slow_model(root / f"run/fold{number}", settings.layers, seed=number)
        for number in range(settings.soundscapes):
            write_audio(root / f"soundscapes/soundscape_{number}.ogg", noise(60, "wind", rng) * 0.02)
        began = time.time()
        process = started(root, command(root))
        ready = time.time() - began
        if process.wait():
            raise UserError("src.infer failed")
        needed = time.time() - began
        valid, n_rows = verdict(root)
        lines, n_good = [f"| none | {needed:.1f} | {'yes' if valid else 'NO'} | {n_rows} of {n_rows} | all |"], 0
        for fraction in sorted(rng.uniform(settings.shortest, 1, settings.limits)):
            limit, began = fraction * needed, time.time()
            text = subprocess.run(limited(root, limit), check=True, stdout=subprocess.PIPE, text=True).stdout
            took, (valid, scored) = time.time() - began, verdict(root)
            n_good += valid and took <= limit
            lines.append(f"| {limit:.1f} ({fraction:.2f}) | {took:.1f} | {'yes' if valid else 'NO'} | {scored} of {n_rows} | {last_plan(text)} |")
            say(lines[-1])
        after_kill: list[tuple[bool, int]] = []
        while len(after_kill) < settings.kills:
            after_kill += filter(None, [killed(root, rng.uniform(0, needed - ready), 2 * needed)])
        n_valid = sum(valid for valid, _ in after_kill)
    text = "\n".join([
        "# Deadline guard", "", about(" ".join(["python -m benchmarks.deadline", *(sys.argv[1:] if argv is None else argv)])), "",
        f"{settings.soundscapes} soundscapes of a minute, three models of {settings.layers} convolutions of 7 x 7, one thread, windows every 2.5 s; load "
        f"average {load:.1f} at the start. A limit is from the process's start; valid: complete, and passed by the validator.", "",
        f"**Limits:** valid and before the limit {n_good} times of {settings.limits}. **`kill -9`** at {settings.kills} random moments of scoring, "
        f"the rows being written after each soundscape: a valid, complete submission was left {n_valid} times of {settings.kills}, with "
        f"{min(rows for _, rows in after_kill)} to {max(rows for _, rows in after_kill)} rows scored already.", "",
        "| limit, s (share of what all takes) | took, s | valid | rows scored, others hold the prior | plan |", "|---|---|---|---|---|", *lines, ""])
    write_text(settings.out, text)
    say(text)
    return int(n_good < settings.limits or n_valid < settings.kills)


if __name__ == "__main__":
    sys.exit(main())
