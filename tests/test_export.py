"""Exported folds: told by their SHA-256, found in their order, the same bytes wherever they are made."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnxruntime

from src import checkpoint, export, infer, onnx_models
from src.storage import owned_file, sha256


def test_a_changed_model_is_refused_and_a_missing_one_exported(tmp_path, run, soundscapes, capsys):
    shutil.copytree(run / "fold0", tmp_path / "run/fold0")
    path = tmp_path / "run/fold0/model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert infer.main(["--run", str(tmp_path / "run"), "--soundscapes", str(soundscapes), "--out", str(tmp_path / "s.csv")]) == 1
    assert "model.onnx is damaged" in capsys.readouterr().err
    path.write_bytes(content[: len(content) // 2])  # what onnxruntime cannot even open
    assert infer.main(["--run", str(tmp_path / "run"), "--soundscapes", str(soundscapes), "--out", str(tmp_path / "s.csv")]) == 1
    assert "model.onnx is damaged" in capsys.readouterr().err and not (tmp_path / "s.csv").exists()
    path.unlink()
    assert infer.main(["--run", str(tmp_path / "run"), "--soundscapes", str(soundscapes), "--out", str(tmp_path / "s.csv")]) == 0
    assert path.exists()


def test_an_export_tells_nothing_of_the_place_it_was_made_in(tmp_path, run):
    shutil.copytree(run / "fold0", tmp_path / "elsewhere/fold0", ignore=shutil.ignore_patterns("model.onnx*"))
    code = "import os, sys; sys.path[:0] = [os.getcwd()]; from src import export; sys.exit(export.main(['--run', sys.argv[1]]))"
    shutil.copytree("src", tmp_path / "project/src")
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "elsewhere")], cwd=tmp_path / "project").returncode == 0
    there = (tmp_path / "elsewhere/fold0/model.onnx").read_bytes()
    assert there == (run / "fold0/model.onnx").read_bytes() and b"src/models" not in there and b"File " not in there


def test_a_model_is_opened_once_and_exported_again_for_other_weights(tmp_path, run, monkeypatch):
    fold = Path(shutil.copytree(run / "fold0", tmp_path / "run/fold0"))
    opened, opens = [], onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *rest, **kw: opened.append(rest) or opens(*rest, **kw))
    (model,) = onnx_models.find_models([tmp_path / "run"], threads=1)
    assert len(opened) == 1 and model.weights_sha256 == sha256(fold / "weights.safetensors")
    tensors, facts = checkpoint.load_tensors(fold / "weights.safetensors")
    checkpoint.save_tensors(fold / "weights.safetensors", tensors, {**facts, "another": "fact"})
    (again,) = onnx_models.find_models([tmp_path / "run"], threads=1)
    assert model.weights_sha256 != again.weights_sha256 == sha256(fold / "weights.safetensors")


def test_a_second_export_of_a_fold_is_told_to_wait(tmp_path, run, capsys):
    fold = Path(shutil.copytree(run / "fold0", tmp_path / "run/fold0", ignore=shutil.ignore_patterns("model.onnx*")))
    with owned_file(fold / "model.onnx"):
        assert export.main(["--run", str(tmp_path / "run")]) == 1
    assert "model.onnx is in use by another process; wait for it" in capsys.readouterr().err and not list(fold.glob("model.onnx*"))


def test_a_run_s_folds_stand_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_models, "load_model", lambda path, *_: SimpleNamespace(path=path, classes=("a",)))
    for fold in range(12):
        (tmp_path / f"fold{fold}").mkdir()
        (tmp_path / f"fold{fold}/model.onnx").touch()
    assert [model.path.parent.name for model in onnx_models.find_models([tmp_path], threads=1)] == [f"fold{fold}" for fold in range(12)]
