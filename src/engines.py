"""What computes a model.onnx on the CPU: onnxruntime in float32, or OpenVINO in float32, bfloat16 or int8. Without torch."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from .console import UserError
from .storage import sha256

ENGINES, PRECISIONS = ("auto", "onnxruntime", "openvino"), ("f32", "bf16", "int8")
INSTALL = "pip install -r requirements-openvino.txt"
MACRO_AP_BOUND = 0.002  # what a lossy precision may change in a fold's out-of-fold macro AP, up or down

Runner = Callable[[np.ndarray, onnxruntime.RunOptions | None], np.ndarray]  # (B, 1, n_mels, window_frames) float32 -> (B, n_classes) logits


@dataclass(frozen=True)
class Engine:
    name: str = "onnxruntime"
    precision: str = "f32"

    @property
    def lossy(self) -> bool:
        return self.precision != "f32"

    def __str__(self) -> str:
        return f"{self.name} {onnxruntime.__version__ if self.name == 'onnxruntime' else version(self.name)}, {self.precision}"


def choose(name: str, precision: str) -> Engine:
    """The engine of --engine and --precision. `auto`: onnxruntime in f32, where OpenVINO took as long for asca_nano and longer for
    asca_test (benchmarks/inference.py measures it anew); OpenVINO for bf16 and int8, which it alone has.

    Raises UserError for what is not installed, what onnxruntime lacks, and what this CPU would only imitate.
    """
    installed = importlib.util.find_spec("openvino") is not None
    if name == "auto":
        name = "onnxruntime" if precision == "f32" else "openvino"
    if name == "onnxruntime" and precision != "f32":
        raise UserError(f"--engine onnxruntime computes in f32 only; --precision {precision} needs --engine openvino")
    if name == "openvino" and not installed:
        raise UserError(f"--engine openvino, --precision {precision}: OpenVINO is not installed; run {INSTALL}")
    if precision == "bf16" and "BF16" not in (able := openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")):
        raise UserError(f"--precision bf16: this CPU does not compute in bfloat16 (it has {', '.join(able)}); use --precision f32 or int8")
    return Engine(name, precision)


def openvino():
    """The module, imported so that it stays silent: on import it would report itself to a statistics server by openvino_telemetry;
    where that package cannot be imported it does without."""
    sys.modules.setdefault("openvino_telemetry", None)
    import openvino

    return openvino


def quantised_path(model: Path) -> Path:
    """The int8 model that src.precision makes from a model.onnx."""
    return model.with_suffix(".openvino-int8") / "model.xml"


def verdict_path(model: Path, engine: Engine) -> Path:
    return model.with_suffix(f".{engine.name}-{engine.precision}.json")


def facts(model: Path, engine: Engine) -> dict[str, str]:
    """What a verdict holds for: these files under this engine."""
    files = {"model_sha256": model}
    if engine.precision == "int8":
        files |= {"xml_sha256": quantised_path(model), "bin_sha256": quantised_path(model).with_suffix(".bin")}
    return {"engine": str(engine), **{name: sha256(path) if path.exists() else "missing" for name, path in files.items()}}


def evidence(model: Path, engine: Engine) -> list[Path]:
    """The files beside a model that a lossy precision needs: the verdict, and for int8 the quantised model."""
    xml = quantised_path(model)
    return [verdict_path(model, engine), *([xml, xml.with_suffix(".bin")] if engine.precision == "int8" else [])]


def require_verdict(model: Path, engine: Engine) -> None:
    """Raises UserError unless src.precision measured and accepted this model under this engine."""
    path = verdict_path(model, engine)
    command = f"python -m src.precision --run {model.parent.parent} --precision {engine.precision}"
    try:
        verdict = json.loads(path.read_text(encoding="utf-8"))
        measured = {name: verdict[name] for name in facts(model, engine)}
        accepted, change = verdict["accepted"], verdict["macro_ap_change"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{model}: nobody measured what {engine} changes; run {command}") from None
    if measured != facts(model, engine):
        raise UserError(f"{path} is about another model or another version of the engine; run {command}")
    if accepted is not True:
        raise UserError(f"{model}: {engine} changes the out-of-fold macro AP by {change:+.4f}, beyond the bound of {MACRO_AP_BOUND}; use --precision f32")


def open_runner(model: Path, session: onnxruntime.InferenceSession, engine: Engine, threads: int) -> Runner:
    """One window a call and one thread a call, as many calls at once as there are threads.

    So a window's activations stay in the cache, no operator waits for the slowest thread, and no spinning thread takes the decoder's core,
    as in onnxruntime's own way of sharing a batch between threads. The arena and all graph optimisations stay on: both save time.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="model")
    # OpenVINO never computes in the main thread, not even to compile: that one receives the signals, and what AMX adds to its registers
    # overflows the stack that faulthandler gives to their handlers (it is on in notebooks and in pytest).
    one = pool.submit(_openvino_window, model, engine.precision, threads).result() if engine.name == "openvino" else _onnxruntime_window(session)

    def run(log_mel: np.ndarray, halt: onnxruntime.RunOptions | None = None) -> np.ndarray:
        return np.concatenate(list(pool.map(lambda window: one(window, halt), log_mel[:, None])))

    return run


def _onnxruntime_window(session: onnxruntime.InferenceSession) -> Runner:
    return lambda window, halt: session.run(["logits"], {"log_mel": window}, halt)[0]


def _openvino_window(model: Path, precision: str, threads: int) -> Runner:
    """A stream and a request a thread. The precision is always named: OpenVINO's own choice is bfloat16 wherever the CPU has it."""
    core = openvino().Core()
    compiled = core.compile_model(core.read_model(quantised_path(model) if precision == "int8" else model), "CPU", {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": threads,
        "ENABLE_CPU_PINNING": False})  # a pinned thread would wait beside the decoder while another core idles
    own, first = threading.local(), threading.Lock()

    def one(window: np.ndarray, halt: onnxruntime.RunOptions | None) -> np.ndarray:
        if halt is not None and halt.terminate:
            raise Fail("the time is up")  # as onnxruntime says it
        if not hasattr(own, "request"):
            # The first array that crosses into OpenVINO initialises pybind11's numpy interface: two threads that did so at once waited
            # for each other for ever.
            with first:
                own.request = compiled.create_infer_request()
                own.request.infer({"log_mel": window})
        else:
            own.request.infer({"log_mel": window})
        return own.request.get_output_tensor(0).data.copy()

    return one
