"""Minutes for 24,000 windows from audio to the submission, by model and engine, with shares of the CPU time, of the peak, and memory.

    python -m benchmarks.inference [--models asca_nano asca_nano:relu asca_0x5 ...] [--engines onnxruntime:f32 openvino:bf16] [--full]

Made audio (one 10-minute Ogg Vorbis, linked) and fresh weights: neither changes the time. A model is <name>[:<activation>][x<folds>], or the
folder of a trained run, whose bfloat16 src.precision must have accepted first.
Writes benchmarks/results/inference.md and inference.png.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import soundfile
import torch
from matplotlib.figure import Figure

from benchmarks.machine import about
from src import audio, engines, plots, soundscapes, submission
from src.config import AudioConfig
from src.console import UserError, progress, say, stage, usable_cores
from src.demo_data import RATE, noise
from src.engines import Engine
from src.export import load_model, write_onnx
from src.models import create_model
from src.models.asca import ACTIVATIONS
from src.network_cost import count_gmacs, made_log_mel, settle
from src.settings import parse
from src.storage import fold_folders, sha256, write_json, write_text
from src.train_settings import TrainSettings

WINDOWS, FILE_WINDOWS, N_CLASSES, GEMM_SIDE = 24_000, 120, 264, 1536
PARTS = {"start": "0.75", "decode": "C0", "log-mel": "C1", "model": "C2"}  # and their colours


@dataclass(frozen=True)
class InferenceSettings:
    models: tuple[str, ...] = ("asca_test", "asca_nano", "asca_nano:gelu", "asca_nano:silu", "asca_nano:hard_swish", "asca_nano:relu", "asca_0", "asca_0x5",
                               "efficientnet_b0", "eca_nfnet_l0", "tf_efficientnetv2_s")
    engines: tuple[str, ...] = ()
    """<engine>:<precision>; by default onnxruntime:f32 and, where OpenVINO is installed, its f32 and (where the CPU has it) bf16."""
    windows: int = 480
    """Measured, in whole files of 120, and scaled to 24,000."""
    full: bool = False
    """Measure all 24,000 (200 files), and the memory for one file of 10 hours."""
    hours: float = 0.0
    """Length of the long file, scored by the first model; 0: none, but 10 with --full."""
    threads: int = 0
    """0: all cores."""
    out: Path = Path("benchmarks/results/inference.md")
    """The picture lies beside it."""


@dataclass(frozen=True)
class Run:
    """One src.infer in a process of its own."""

    wall: float  # s
    cpu: float  # s, user and system, of all its threads
    peak: float  # GiB of resident memory


def make_run(folder: Path, spec: str) -> float:
    """A run of fresh, exported folds; returns its GMACs a window."""
    found = re.fullmatch(rf"(\w+?)(?::({'|'.join(ACTIVATIONS)}))?(?:x(\d+))?", spec)
    if not found:
        raise UserError(f"--models {spec}: a model is <name>[:<activation>][x<folds>], an activation one of {', '.join(ACTIVATIONS)}")
    name, network, n_folds = found[1], TrainSettings().network, int(found[3] or 1)  # as src.train makes it
    if found[2]:
        network = replace(network, asca=replace(network.asca, activation=found[2]))
    config = AudioConfig()
    torch.manual_seed(0)
    log_mel = made_log_mel(2, config)
    model = settle(create_model(name, N_CLASSES, config, network), log_mel)
    facts = {"audio": json.dumps(config.to_dict()), "classes": json.dumps([f"c{n}" for n in range(N_CLASSES)]), "prior": json.dumps([0.01] * N_CLASSES)}
    for fold in range(n_folds):
        path = folder / f"fold{fold}" / "model.onnx"
        path.parent.mkdir(parents=True)
        write_onnx(model, log_mel, path)
        graph = onnx.load(path)
        onnx.helper.set_model_props(graph, facts)
        onnx.save(graph, path)
        write_text(path.with_name("model.onnx.sha256"), f"{sha256(path)}  model.onnx\n")
        bf16 = Engine("openvino", "bf16")
        write_json(engines.verdict_path(path, bf16), {**(engines.facts(path, bf16) if have_openvino() else {}), "accepted": True, "macro_ap_change": 0.0})
    return n_folds * count_gmacs(model, log_mel[:1])


def gmacs_of(run: Path) -> float:
    """GMACs a window of all folds of a trained run."""
    folders = fold_folders(run, "weights.safetensors")
    model, config = load_model(folders[0])
    return len(folders) * count_gmacs(model, made_log_mel(1, AudioConfig.from_dict(config["audio"])))


def accuracy_of(run: Path, engine: Engine) -> str:
    """What src.precision found of a trained run's folds; src.infer refuses one that it did not accept."""
    verdicts = [json.loads(engines.verdict_path(folder / "model.onnx", engine).read_text(encoding="utf-8")) for folder in fold_folders(run, "model.onnx")]
    changes = ", ".join(f"{one['macro_ap_f32']:.4f} -> {one['macro_ap']:.4f}" for one in verdicts)
    return (f"{run}, {engine}: out-of-fold macro AP by fold {changes} (bound {engines.MACRO_AP_BOUND}); "
            f"probabilities change by {max(one['largest_change'] for one in verdicts):.1e} at most.")


def have_openvino() -> bool:
    try:
        return bool(engines.choose("openvino", "f32"))
    except UserError:
        return False


def usable_engines(wanted: tuple[str, ...]) -> list[Engine]:
    """Those asked for; by default all that work here. int8 has to be calibrated on real windows: src.precision tells its worth."""
    if wanted:
        return [engines.choose(*name.split(":")) for name in wanted]
    found = []
    for name, precision in (("onnxruntime", "f32"), ("openvino", "f32"), ("openvino", "bf16")):
        try:
            found.append(engines.choose(name, precision))
        except UserError as error:
            say(f"left out: {error}")
    return found


def write_file(path: Path, seconds: float) -> None:
    """Rain, in blocks of ten minutes."""
    with soundfile.SoundFile(path, "w", RATE, 1, format="OGG", subtype="VORBIS") as file:
        block = (noise(min(seconds, 600.0), "rain", np.random.default_rng(0)) * 0.05).astype(np.float32)
        for start in range(0, round(seconds * RATE), len(block)):
            for second in range(0, min(len(block), round(seconds * RATE) - start), RATE):  # libsndfile crashes on long Vorbis blocks
                file.write(block[second : second + RATE])


CHILD = """
import resource, sys
from pathlib import Path
from src import infer
code = infer.main(sys.argv[2:])
status = Path("/proc/self/status")  # Linux carries a parent's ru_maxrss over into its child
bytes_ = (int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else
          resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
Path(sys.argv[1]).write_text(str(bytes_))
sys.exit(code)
"""


def infer(run: Path, sounds: Path, engine: Engine, threads: int) -> Run:
    root = sounds.parent
    command = [sys.executable, "-c", CHILD, str(root / "peak"), "--run", str(run), "--soundscapes", str(sounds), "--out", str(root / "submission.csv"),
               "--engine", engine.name, "--precision", engine.precision, "--threads", str(threads)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"src.infer {' '.join(command[4:])} failed")
    return Run(time.perf_counter() - began, usage.ru_utime + usage.ru_stime, int((root / "peak").read_text()) / 2**30)


def cpu_seconds(work: Callable[[], object]) -> float:
    """The least of three, after one to warm up."""
    work()
    times = []
    for _ in range(3):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def front_end(path: Path) -> tuple[float, float]:
    """CPU seconds a window of decoding, and of log-mel and cutting."""
    config = AudioConfig()

    def decode() -> None:
        for _ in audio.read_blocks(path, config.sample_rate):
            pass

    def windows() -> None:
        found = soundscapes.find_soundscapes(path.parent, 600.0)[:1]
        for _ in soundscapes.decode(found, lambda s: {config: submission.window_starts(s.n_rows, config.window_seconds, 5.0)}, 8):
            pass

    decoding = cpu_seconds(decode) / FILE_WINDOWS
    return decoding, cpu_seconds(windows) / FILE_WINDOWS - decoding


def gemm_gmacs(threads: int) -> float:
    """onnxruntime's float32 matrix product: GMAC a CPU second, the peak that the models are held against."""
    n, kinds = GEMM_SIDE, onnx.TensorProto
    tensors = [onnx.helper.make_tensor_value_info(name, kinds.FLOAT, [n, n]) for name in "ABC"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["A", "B"], ["C"])], "gemm", tensors[:2], tensors[2:])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    matrices = dict(zip("AB", np.random.default_rng(0).standard_normal((2, n, n)).astype(np.float32)))
    return n**3 / 1e9 / cpu_seconds(lambda: session.run(None, matrices))


def run_of(root: Path, spec: str) -> Path:
    """The folder that a model names, or the one that is made for it."""
    return Path(spec) if Path(spec).is_dir() else root / spec.replace(":", "-")


def spelt(spec: str) -> str:
    """asca_nano:relux5 -> asca_nano, relu, 5 folds"""
    if Path(spec).is_dir():
        return spec
    name, folds = re.fullmatch(r"(.+?)(?:x(\d+))?", spec).groups()
    return ", ".join(name.split(":") + ([f"{folds} folds"] if folds else []))


def draw(path: Path, rows: list[dict]) -> None:
    """Bars: CPU minutes over threads, what a machine with nothing else to do comes close to; strokes: the minutes that passed."""
    figure = Figure(figsize=(9, 1.8 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for part, colour in PARTS.items():
        width = np.array([row["parts"][part] for row in rows])
        axes.barh(range(len(rows)), width, left=left, color=colour, label=part)
        left += width
    axes.plot([row["minutes"] for row in rows], range(len(rows)), "k|", markersize=12, label="minutes passed")
    axes.set_yticks(range(len(rows)), [f"{spelt(row['model'])}: {row['engine']}" for row in rows], fontsize=8)
    axes.margins(y=0.02)
    axes.invert_yaxis()
    axes.set_xlabel("minutes for 24,000 windows of 5 s (bars: CPU minutes / threads)")
    figure.legend(loc="outside upper center", ncols=len(PARTS) + 1, fontsize=8)
    plots.save(figure, path)


def measure(root: Path, settings: InferenceSettings, threads: int, chosen: list[Engine]) -> tuple[list[dict], list[str]]:
    n_files = WINDOWS // FILE_WINDOWS if settings.full else max(1, settings.windows // FILE_WINDOWS)
    sounds, empty = root / "sounds", root / "empty"
    sounds.mkdir()
    empty.mkdir()
    write_file(sounds / "0.ogg", 600.0)
    for number in range(1, n_files):
        (sounds / f"{number}.ogg").hardlink_to(sounds / "0.ogg")
    decode, log_mel = front_end(sounds / "0.ogg")
    scale, rows, peaks = WINDOWS / (n_files * FILE_WINDOWS), [], [gemm_gmacs(threads)]
    for spec in progress(settings.models, what="models", unit="model"):
        run = run_of(root, spec)
        gmacs = gmacs_of(run) if run == Path(spec) else make_run(run, spec)
        for engine in chosen:
            begin, whole = infer(run, empty, engine, threads), infer(run, sounds, engine, threads)
            peaks.append(gemm_gmacs(threads))
            front = {"decode": decode * WINDOWS, "log-mel": log_mel * WINDOWS}
            model = max(1e-9, (whole.cpu - begin.cpu) * scale - sum(front.values()))
            parts = {name: seconds / 60 / threads for name, seconds in {"start": begin.cpu, **front, "model": model}.items()}
            rows.append({"model": spec, "engine": f"{engine.name} {engine.precision}", "minutes": (begin.wall + (whole.wall - begin.wall) * scale) / 60,
                         "parts": parts, "gmacs": gmacs, "gmacs_a_second": gmacs * WINDOWS / model, "fp32": max(peaks[-2:]), "peak": whole.peak})
            say(f"{spec}, {engine}: {rows[-1]['minutes']:.1f} min, {sum(parts.values()):.1f} CPU min / threads, {whole.peak:.2f} GiB")
    notes = [f"The front-end: decode {decode * 1e3:.2f}, log-mel {log_mel * 1e3:.2f} ms of CPU time a window. The fp32 peak is "
             f"onnxruntime's product of {GEMM_SIDE} x {GEMM_SIDE} matrices on the same threads, the better of two: before and after each row's run."]
    notes += [accuracy_of(run_of(root, spec), engine) for spec in settings.models if run_of(root, spec) == Path(spec) for engine in chosen if engine.lossy]
    hours = settings.hours or (10.0 if settings.full else 0.0)
    if hours:
        (root / "long").mkdir()
        write_file(root / "long" / "long.ogg", hours * 3600)
        long = infer(run_of(root, settings.models[0]), root / "long", chosen[0], threads)
        notes.append(f"One file of {hours:g} hours, {settings.models[0]}, {chosen[0].name}: peak memory {long.peak:.2f} GiB; {n_files} files of 10 minutes "
                     f"with the same: {rows[0]['peak']:.2f} GiB.")
    return rows, notes


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(InferenceSettings, argv, prog="python -m benchmarks.inference", description=__doc__)
    threads, chosen = settings.threads or usable_cores(), usable_engines(settings.engines)
    load, limited = os.getloadavg()[0], f" on {usable_cores()} of the cores" if usable_cores() < (os.cpu_count() or 1) else ""
    say(f"{', '.join(settings.models)}; {', '.join(map(str, chosen))}; {threads} thread(s)")
    with tempfile.TemporaryDirectory() as folder:
        rows, notes = measure(Path(folder), settings, threads, chosen)
    lines = ["# Inference speed", "", about("python -m benchmarks.inference " + " ".join(sys.argv[1:] if argv is None else argv)), "",
             f"{threads} threads{limited}; load average {load:.1f} at the start. {', '.join(map(str, chosen))}; batch 1 a thread. "
             + ("All 24,000 windows (200 files of 10 minutes) measured." if settings.full else
                f"{max(1, settings.windows // FILE_WINDOWS) * FILE_WINDOWS} windows measured, scaled to 24,000 (200 files of 10 minutes)."), "", *notes, "",
             "| model | engine | minutes passed | CPU minutes / threads | start | decode | log-mel | model | GMAC a window "
             "| GMAC a CPU s | fp32 peak | share | peak GiB |",
             "|---|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        total = sum(row["parts"].values())
        shares = " | ".join(f"{row['parts'][part] / total:.1%}" for part in PARTS)
        lines.append(f"| {row['model']} | {row['engine']} | {row['minutes']:.1f} | {total:.1f} | {shares} | {row['gmacs']:.2f} "
                     f"| {row['gmacs_a_second']:.1f} | {row['fp32']:.1f} | {row['gmacs_a_second'] / row['fp32']:.0%} | {row['peak']:.2f} |")
    picture = settings.out.with_suffix(".png")
    draw(picture, rows)
    write_text(settings.out, "\n".join([*lines, "", f"![the same as bars]({picture.name})", ""]))
    say("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
