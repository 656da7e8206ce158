"""A tiny data set in BirdCLEF's layout, its cache, and one trained and exported fold, made once a session."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import settings

from src import bundle, cache, engines, export, folds, train
from src.demo_data import RATE, SPECIES, noise, sing, write_audio
from src.engines import Engine
from src.storage import write_json

settings.register_profile("untimed", deadline=None)  # a busy machine is no fault
settings.load_profile("untimed")

TRAIN = ("--model", "asca_test", "--input-side", "64", "--epochs", "3", "--batch-size", "6", "--threads", "1", "--fold", "0", "--weight-noise", "0.02")


def make_data(root: Path, per_species: int = 6) -> pd.DataFrame:
    rng, rows = np.random.default_rng(1), []
    for species in SPECIES[:3]:
        for number in range(per_species):
            seconds = (2.5, 4.99, 6.3, 7.777)[number % 4]  # shorter than a window, exactly one (500 frames), longer
            sound = noise(seconds, "wind", rng) * 0.01
            sing(sound, species, 0.1, 0.3, rng)
            name = f"{species.code}/XC{species.code}{number}.ogg"
            write_audio(root / "train_audio" / name, sound)
            rows.append({"primary_label": species.code, "secondary_labels": "['demcuc1']" if number == 1 else "[]",
                         "author": f"author {number % 3}", "rating": "4.0", "filename": name})
    table = pd.DataFrame(rows)
    table.to_csv(root / "train_metadata.csv", index=False)
    write_audio(root / "noise" / "wind.ogg", noise(6, "wind", rng) * 0.05)
    return table


def make_soundscape(path: Path, seconds: float, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    sound = noise(seconds, "wind", rng) * 0.01
    sing(sound, SPECIES[0], 0.2, 0.3, rng)
    write_audio(path, sound)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_data(root)
    return root


@pytest.fixture(scope="session")
def cached(data: Path) -> Path:
    out = data / "cache"
    assert cache.main(["--data", str(data), "--out", str(out), "--workers", "2"]) == 0
    return out


@pytest.fixture(scope="session")
def fold_table(data: Path) -> Path:
    out = data / "folds.csv"
    assert folds.main(["--data", str(data), "--out", str(out), "--n-folds", "3"]) == 0
    return out


@pytest.fixture(scope="session")
def train_flags(data: Path, cached: Path, fold_table: Path) -> list[str]:
    return ["--data", str(data), "--cache", str(cached), "--folds", str(fold_table), "--noise", str(data / "noise"), *TRAIN]


@pytest.fixture(scope="session")
def run(data: Path, train_flags: list[str]) -> Path:
    out = data / "run"
    assert train.main([*train_flags, "--run", str(out)]) == 0
    assert export.main(["--run", str(out)]) == 0
    return out


@pytest.fixture
def copied(tmp_path: Path, run: Path) -> Path:
    """The run's copy, which a test may change."""
    return shutil.copytree(run, tmp_path / "run")


@pytest.fixture(autouse=True)
def shared_files_are_left_as_they_are(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that changes them, not the one that comes after it: the order of the test files is that of the processes that are free."""
    shared = request.getfixturevalue("data") if "data" in request.fixturenames else None
    run = request.getfixturevalue("run") if "run" in request.fixturenames else None
    before, before_in_run = files_of(shared), files_of(run)
    yield
    assert before.items() <= files_of(shared).items(), "shared files were changed: work on a copy"  # more may be there: a fixture's, made since
    assert files_of(run) == before_in_run, "the shared run was changed: work on `copied`"


@pytest.fixture(scope="session")
def built(data: Path, run: Path) -> Path:
    """The run's bundle for Kaggle."""
    out = data / "bundle"
    assert bundle.main(["--run", str(run), "--out", str(out), "--owner", "someone"]) == 0
    return out


@pytest.fixture(scope="session")
def measured_run(data: Path, run: Path) -> Path:
    """The run with an accepted verdict on bf16 and on int8; a model of float16 weights stands in for NNCF's of 8 bits: OpenVINO runs it as that."""
    if importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO, which is optional, is not installed: pip install -r requirements-openvino.txt")
    out = data / "measured/run"
    shutil.copytree(run / "fold0", out / "fold0")
    model = out / "fold0/model.onnx"
    openvino = engines.openvino()
    openvino.save_model(openvino.Core().read_model(model), engines.quantised_path(model), compress_to_fp16=True)
    for precision in ("bf16", "int8"):
        engine = Engine("openvino", precision)
        write_json(engines.verdict_path(model, engine), {**engines.facts(model, engine), "macro_ap_change": 0.0, "accepted": True})
    return out


@pytest.fixture(scope="session")
def built_lossy(data: Path, measured_run: Path) -> dict[str, Path]:
    """Its bundles that ask for bf16 and for int8."""
    for precision in ("bf16", "int8"):
        assert bundle.main(["--run", str(measured_run), "--out", str(data / f"bundle-{precision}"), "--owner", "someone", "--precision", precision]) == 0
    return {precision: data / f"bundle-{precision}" for precision in ("bf16", "int8")}


@pytest.fixture(scope="session")
def soundscapes(data: Path) -> Path:
    for name, seconds in (("a_1", 12.0), ("b", 3.0), ("c", 599.9 / 20)):
        make_soundscape(data / "test_soundscapes" / f"{name}.ogg", seconds)
    (data / "test_soundscapes" / "notes.txt").write_text("not audio")
    return data / "test_soundscapes"


def raise_(error: BaseException) -> None:
    raise error


def files_of(folder: Path | None) -> dict[Path, tuple[int, int]]:
    """Each file's size and time of change."""
    return {} if folder is None else {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def waveform(seconds: float, rate: int = RATE) -> np.ndarray:
    """Chirps over noise, (n,) float32."""
    t = np.arange(int(seconds * rate)) / rate
    chirps = np.sin(2 * np.pi * (1500 * t + 400 * np.sin(2 * np.pi * 3 * t)))
    return (0.3 * chirps + 0.01 * np.random.default_rng(0).standard_normal(len(t))).astype(np.float32)
