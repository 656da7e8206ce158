import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from src import engines, infer, precision
from src.console import UserError
from src.engines import Engine
from src.onnx_models import load_model

HAVE = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not HAVE, reason="OpenVINO, which is optional, is not installed: pip install -r requirements-openvino.txt")


@pytest.fixture
def log_mel(run):
    from src.checkpoint import load_tensors
    from src.config import AudioConfig
    from src.dataset import to_log_mel

    return to_log_mel(load_tensors(run / "fold0/golden_windows.safetensors")[0]["windows"], AudioConfig()).numpy()


def submission(run, soundscapes, out, *flags) -> pd.DataFrame | None:
    code = infer.main(["--run", str(run), "--soundscapes", str(soundscapes), "--out", str(out), "--threads", "2", *flags])
    return pd.read_csv(out, index_col="row_id") if code == 0 else None


def test_a_batch_is_one_plain_call_of_onnxruntime_window_by_window(run, log_mel):
    path = run / "fold0/model.onnx"
    expected = 1 / (1 + np.exp(-onnxruntime.InferenceSession(path).run(["logits"], {"log_mel": log_mel})[0]))
    one, three = load_model(path, 1).probabilities(log_mel), load_model(path, 3).probabilities(log_mel)
    np.testing.assert_array_equal(one, three)  # the number of threads changes no bit
    np.testing.assert_allclose(one, expected, atol=1e-6)


@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_a_call_is_ended_from_outside(run, log_mel, engine):
    halt = onnxruntime.RunOptions()
    halt.terminate = True
    with pytest.raises(Fail):
        load_model(run / "fold0/model.onnx", 2, Engine(engine)).probabilities(log_mel, halt)


@needs_openvino
def test_openvino_in_f32_writes_onnxruntime_s_submission(tmp_path, run, soundscapes):
    expected = submission(run, soundscapes, tmp_path / "a.csv")
    np.testing.assert_allclose(submission(run, soundscapes, tmp_path / "b.csv", "--engine", "openvino"), expected, atol=1e-5)


def test_what_is_not_installed_is_named_with_its_remedy(tmp_path, run, soundscapes, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "openvino" else find(name, *rest))
    for flags in (("--engine", "openvino"), ("--precision", "bf16")):
        assert submission(run, soundscapes, tmp_path / "s.csv", *flags) is None
        assert "pip install -r requirements-openvino.txt" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs --engine openvino"):
        engines.choose("onnxruntime", "int8")


@needs_openvino
def test_openvino_is_imported_without_its_statistics():
    code = ("import sys\nfrom src import engines\nopenvino = engines.openvino()\n"
            "assert openvino.Core and not any(name.startswith('openvino_telemetry.') for name in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@needs_openvino
@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_a_lossy_precision_needs_a_verdict_on_this_very_model(tmp_path, copied, soundscapes, capsys, kind):
    if kind == "int8":
        pytest.importorskip("nncf", reason="NNCF, which is optional, is not installed: pip install -r requirements-openvino.txt")
    try:
        engine = engines.choose("openvino", kind)
    except UserError as error:
        pytest.skip(str(error))
    flags = ("--engine", "openvino", "--precision", kind)
    assert submission(copied, soundscapes, tmp_path / "s.csv", *flags) is None
    assert f"python -m src.precision --run {copied} --precision {kind}" in capsys.readouterr().err
    code = precision.main(["--run", str(copied), "--precision", kind, "--threads", "1", "--calibration-windows", "4"])
    path = engines.verdict_path(copied / "fold0/model.onnx", engine)
    verdict = json.loads(path.read_text())
    assert verdict["accepted"] == (code == 0) == (abs(verdict["macro_ap_change"]) <= engines.MACRO_AP_BOUND) and verdict["largest_change"] > 0
    path.write_text(json.dumps(verdict | {"accepted": True}))
    lossy, exact = submission(copied, soundscapes, tmp_path / "s.csv", *flags), submission(copied, soundscapes, tmp_path / "e.csv")
    assert 1e-6 < np.abs(lossy - exact).to_numpy().max() < 0.5
    for change, message in (({"accepted": False}, "beyond the bound"), ({"model_sha256": "0"}, "another model"), ({"engine": "openvino 1, bf16"}, "another")):
        path.write_text(json.dumps(verdict | {"accepted": True} | change))
        assert submission(copied, soundscapes, tmp_path / "s.csv", *flags) is None
        assert message in capsys.readouterr().err


@needs_openvino
def test_a_model_that_is_replaced_while_it_is_measured_has_no_verdict(copied, capsys, monkeypatch):
    model, measured = copied / "fold0/model.onnx", precision.probabilities

    def replaced(*words):
        with open(model, "ab") as file:
            file.write(b" ")
        return measured(*words)

    monkeypatch.setattr(precision, "probabilities", replaced)
    flags = ["--run", str(copied), "--precision", "f32", "--threads", "1"]
    assert precision.main(flags) == 1 and not list(model.parent.glob("*openvino*"))
    assert "model.onnx" in capsys.readouterr().err
    assert precision.main([*flags, "--calibration-windows", "0"]) == 1 and "--calibration-windows 0: it is at least 1" in capsys.readouterr().err


@needs_openvino
def test_a_model_without_its_fold_cannot_be_measured(copied, capsys):
    (copied / "fold1").mkdir()
    for name in ("model.onnx", "model.onnx.sha256"):
        shutil.copy(copied / "fold0" / name, copied / "fold1")
    assert precision.main(["--run", str(copied), "--precision", "f32", "--threads", "1"]) == 1
    assert f"{copied / 'fold1/model.onnx'} stands without its weights" in capsys.readouterr().err


def test_auto_loses_no_precision_unasked():
    assert engines.choose("auto", "f32") == Engine("onnxruntime", "f32")


def test_the_bound_is_on_the_macro_ap_of_recordings():
    truth, places = np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 2, 3])
    good = np.array([[0.9, 0.1], [0.9, 0.1], [0.8, 0.1], [0.1, 0.8], [0.1, 0.9]])
    shifted, turned = good + 1e-4, good[:, ::-1]
    assert precision.compare(good, good, places, truth, lossy=False)["accepted"]
    kept = precision.compare(good, shifted, places, truth, lossy=True)
    assert kept["accepted"] and kept["largest_change"] == pytest.approx(1e-4) and kept["macro_ap"] == 1
    assert not precision.compare(good, shifted, places, truth, lossy=False)["accepted"], "f32 may only round"
    assert not precision.compare(good, turned, places, truth, lossy=True)["accepted"]
    assert not precision.compare(good, np.full_like(good, np.nan), places, truth, lossy=True)["accepted"]
