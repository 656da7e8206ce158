import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from src import bundle, competitions, engines, golden, infer, kaggle
from src.console import UserError
from src.engines import Engine
from src.storage import write_json

ONNXRUNTIME = f"onnxruntime-{version('onnxruntime')}"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def copy(tmp_path, built) -> Path:
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def test_two_builds_are_the_same_bytes_and_the_manifest_covers_them(tmp_path, run, built):
    again = tmp_path / "again"
    for _ in range(2):  # the second one replaces the first
        assert bundle.main(["--run", str(run), "--out", str(again), "--owner", "someone"]) == 0
    assert contents(again) == contents(built) and [path.name for path in tmp_path.iterdir()] == ["again"]
    listed = [line[66:] for line in (built / kaggle.MANIFEST).read_text().splitlines()]
    assert sorted([*listed, kaggle.MANIFEST, *bundle.METADATA]) == sorted(contents(built))
    assert {"runs/run/fold0/model.onnx", "src/infer.py", "src/__init__.py", "golden/sound.wav", "kaggle_submission.ipynb", "LICENSE"} <= set(listed)
    assert not {"src/train.py", "src/demo_data.py", "src/bundle.py"} & set(listed)
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "--strict", kaggle.MANIFEST], cwd=built, check=True)


def test_the_metadata_are_what_the_kaggle_command_takes(built):
    data, kernel = (json.loads((built / name).read_text()) for name in bundle.METADATA)
    assert data["id"] == "someone/asca-birdclef" and 6 <= len(data["title"]) <= 50 and len(data["licenses"]) == 1
    assert kernel["id"] == "someone/asca-birdclef-submission" and kernel["title"].lower().replace(" ", "-") == kernel["id"].split("/")[1]
    readme = (bundle.ROOT / "README.md").read_text()
    assert bundle.download_command(Engine()) in readme, "the README names another onnxruntime than the one installed"
    if importlib.util.find_spec("openvino"):
        assert bundle.download_command(Engine("openvino", "bf16")) in readme
    assert kernel["dataset_sources"] == [data["id"]] and (built / kernel["code_file"]).exists() and kernel["enable_internet"] is False


@pytest.mark.parametrize(("name", "line"), [("birdclef-2023", "minutes = 110  # of the 120 that"), ("birdclef-2025", "minutes = 80  # of the 90 that")])
def test_the_notebook_keeps_the_competition_s_name_and_time_limit(tmp_path, name, line):
    bundle.write_notebook(tmp_path, name)
    text, committed = (tmp_path / bundle.NOTEBOOK).read_text(), (bundle.ROOT / "notebooks" / bundle.NOTEBOOK).read_text()
    assert line in text and f'year = \\"{name}\\"' in text
    assert (text == committed) == (name == competitions.DEFAULT) and len(json.loads(text)["cells"]) == len(json.loads(committed)["cells"])


def test_runs_keep_their_order_since_the_last_is_dropped_first(tmp_path, run):
    names = ["second", "best"]
    for name in names:
        shutil.copytree(run / "fold0", tmp_path / name / "fold0")
    assert bundle.main(["--run", *(str(tmp_path / name) for name in names), "--out", str(tmp_path / "b"), "--owner", "someone"]) == 0
    assert kaggle.runs(tmp_path / "b") == [str(tmp_path / "b/runs" / name) for name in names]


@pytest.mark.parametrize("name", ["runs/run/fold0/model.onnx", "src/audio.py", "golden/log_mel.npy", "LICENSE"])
def test_a_flipped_bit_and_a_missing_file_are_refused_by_name(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        kaggle.verify(copy)
    (copy / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        kaggle.verify(copy)


def test_a_fold_that_the_bundle_was_not_built_with_is_refused(copy):
    fold = next((copy / "runs").rglob("fold0"))
    shutil.copytree(fold, fold.with_name("fold7"))
    with pytest.raises(UserError, match="fold7/.* is not in manifest.sha256"):
        kaggle.verify(copy)


def test_a_damaged_manifest_is_refused(copy):
    manifest = copy / kaggle.MANIFEST
    for text in ("", manifest.read_text().replace("  LICENSE", " LICENSE")):
        manifest.write_text(text)
        with pytest.raises(UserError, match="is damaged at"):
            kaggle.verify(copy)
    manifest.unlink()
    with pytest.raises(UserError, match="not readable"):
        kaggle.verify(copy)


def test_the_bundle_alone_infers_without_a_training_library(tmp_path, copy, run, soundscapes):
    code = f"""
import sys
sys.path.insert(0, {str(copy)!r})
from pathlib import Path
from src import golden, infer, kaggle, timeline
bundle = Path({str(copy)!r})
assert Path(kaggle.__file__).parents[1] == bundle
kaggle.verify(bundle)
golden.check(bundle / "golden", kaggle.runs(bundle))
assert infer.main(["--run", *kaggle.runs(bundle), "--soundscapes", {str(soundscapes)!r}, "--out", "s.csv", "--threads", "1"]) == 0
bad = {{"torch", "timm", "torchvision", "sklearn", "albumentations", "audiomentations", "tyro"}} & set(sys.modules)
assert not bad, bad
"""
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)  # -I: neither this folder nor PYTHONPATH is on sys.path
    assert infer.main(["--run", str(run), "--soundscapes", str(soundscapes), "--out", str(tmp_path / "expected.csv"), "--threads", "1"]) == 0
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()


@pytest.mark.parametrize(("spoil", "message"), [
    (lambda table: table.assign(demdov1=table.demdov1 + 0.001), "comes out differently"), (lambda table: table.iloc[:1], "other rows")])
def test_other_numbers_than_the_golden_example_s_are_refused(copy, spoil, message):
    spoil(pd.read_csv(copy / "golden/submission.csv", index_col="row_id")).to_csv(copy / "golden/submission.csv")
    with pytest.raises(UserError, match=message):
        golden.check(copy / "golden", kaggle.runs(copy))


def test_small_probabilities_of_other_species_are_no_golden_example(tmp_path):
    rng = np.random.default_rng(0)
    exact = pd.DataFrame(rng.uniform(0.001, 0.09, (6, 264)), index=pd.Index([f"s_{5 * k}" for k in range(1, 7)], name="row_id"))
    exact.to_csv(tmp_path / "exact.csv")
    for spoil, words in ((lambda t: t * rng.uniform(0.97, 1.03, t.shape), ""), (lambda t: t * 0, "correlation"), (lambda t: t.iloc[:, ::-1].to_numpy() + 0 * t,
                         "correlation"), (lambda t: t + 0.2, "probabilities by 0.2"), (lambda t: t.iloc[1:], "probabilities by nan")):
        spoil(exact).to_csv(tmp_path / "found.csv")
        said = golden._distance(tmp_path / "found.csv", tmp_path / "exact.csv")
        assert words in said and bool(words) == bool(said)


def test_a_lossy_precision_travels_with_its_verdict_and_is_tried_before_it_is_used(tmp_path, measured_run, built_lossy, soundscapes, capfd, monkeypatch):
    at = Path(shutil.copytree(built_lossy["int8"], tmp_path / "bundle"))
    kaggle.verify(at)
    assert kaggle.precision(at) == "int8" and {"runs/run/fold0/model.openvino-int8.json", "runs/run/fold0/model.openvino-int8/model.bin"} <= set(contents(at))
    assert not any("bf16" in name for name in contents(at))
    model, engine, runs = at / "runs/run/fold0/model.onnx", Engine("openvino", "int8"), kaggle.runs(at)

    def tried() -> tuple[str, str]:
        found = golden.precision(at / "golden", runs, "int8")
        return found, capfd.readouterr().out.splitlines()[-1]

    assert tried()[0] == "int8"
    flags = ["--soundscapes", str(soundscapes), "--threads", "1"]
    for out, run, precision in (("here", str(measured_run), "int8"), ("there", *runs, "int8"), ("exact", *runs, "f32")):
        assert infer.main(["--run", run, *flags, "--precision", precision, "--out", str(tmp_path / f"{out}.csv")]) == 0
    here, there, exact = ((tmp_path / f"{out}.csv").read_bytes() for out in ("here", "there", "exact"))
    assert here == there != exact
    with monkeypatch.context() as patch:
        patch.setattr(golden, "TRIAL_SECONDS", 0.01)
        assert tried() == ("f32", "float32 instead of int8: src.infer took longer than 0.01 s")
    expected = pd.read_csv(at / "golden/submission.csv", index_col="row_id")
    ((expected + 0.2) % 1).to_csv(at / "golden/submission.csv")
    found, text = tried()
    assert found == "f32" and "changes the golden example's probabilities by" in text
    binary = engines.quantised_path(model).with_suffix(".bin")
    binary.write_bytes(bytes(len(binary.read_bytes())))  # all zeros: the engine fails
    found, text = tried()
    assert found == "f32" and "is about another model or another version" in text
    write_json(engines.verdict_path(model, engine), {**engines.facts(model, engine), "macro_ap_change": 0.0, "accepted": True})
    assert tried()[0] == "f32"


def test_a_processor_without_bfloat16_computes_in_float32_and_says_so(built_lossy, capfd):
    at = built_lossy["bf16"]
    able = engines.openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    found, text = golden.precision(at / "golden", kaggle.runs(at), kaggle.precision(at)), capfd.readouterr().out
    assert found == ("bf16" if "BF16" in able else "f32")
    assert "BF16" in able or "float32 instead of bf16: " in text and "this CPU does not compute in bfloat16" in text and text.count("\n") == 1


def test_a_lossy_precision_is_bundled_with_an_accepted_verdict_and_its_wheel_only(tmp_path, run, measured_run, capsys):
    (tmp_path / "wheels").mkdir()
    (tmp_path / f"wheels/{ONNXRUNTIME}-py3-none-any.whl").write_bytes(b"")
    base = ["--out", str(tmp_path / "b"), "--precision", "int8"]
    for flags, message in ((["--run", str(run), *base], f"python -m src.precision --run {run} --precision int8"),
                           (["--run", str(measured_run), *base, "--wheels", str(tmp_path / "wheels")], "holds no wheel of openvino ")):
        assert bundle.main(flags) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_what_cannot_be_bundled_is_refused(tmp_path, run, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("all of it")
    shutil.copytree(run / "fold0", tmp_path / "run/fold0")
    base = ["--run", str(run), "--out"]
    for flags, message in (([*base, str(tmp_path / "mine")], "is no bundle"), ([*base, str(tmp_path / "b"), "--title", "ASCA"], "6 to 39"),
                           ([*base, str(tmp_path / "b"), "--competition", "birdclef-2022"], "known are birdclef-2023"),
                           ([*base, str(tmp_path / "b"), "--wheels", str(tmp_path)], "pip download onnxruntime=="),
                           (["--run", str(run), str(tmp_path / "run"), "--out", str(tmp_path / "b")], "two runs are named run"),
                           (["--run", "--out", str(tmp_path / "b")], "names no run"),
                           (["--run", str(tmp_path / "none"), "--out", str(tmp_path / "b")], "holds no trained fold")):
        assert bundle.main(flags) == 1
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "run"]


@pytest.mark.parametrize(("tags", "fits"), [
    ("cp312-cp312-manylinux_2_27_x86_64.manylinux_2_28_x86_64", True), ("cp38-abi3-manylinux2014_x86_64", True), ("py3-none-any", True),
    ("cp311-cp311-manylinux_2_28_x86_64", False), ("cp312-cp312-manylinux_2_28_aarch64", False), ("cp312-cp312-win_amd64", False),
    ("cp312-cp312-manylinux_2_39_x86_64", False), ("renamed", False)])
def test_wheels_that_kaggle_cannot_install_are_refused(tmp_path, tags, fits):
    (tmp_path / f"{ONNXRUNTIME}-{tags}.whl").touch()
    if fits:
        bundle.write_wheels(tmp_path, tmp_path / "out", Engine())
        assert len(list((tmp_path / "out").iterdir())) == 1
        (tmp_path / f"onnxruntime-1.0-{tags}.whl").touch()
        with pytest.raises(UserError, match="holds onnxruntime .* and .*; delete the one"):
            bundle.write_wheels(tmp_path, tmp_path / "again", Engine())
        (tmp_path / f"{ONNXRUNTIME}-{tags}.whl").unlink()
        with pytest.raises(UserError, match="holds no wheel of onnxruntime"):  # of the installed version
            bundle.write_wheels(tmp_path, tmp_path / "again", Engine())
        return
    with pytest.raises(UserError, match=f"{tags}.whl is none for Kaggle's Python 3.12 .* pip download onnxruntime=="):
        bundle.write_wheels(tmp_path, tmp_path / "out", Engine())


def test_a_wheel_is_installed_where_its_package_is_absent(tmp_path):
    """Into an environment of its own; the wheel is made here, and named onnxruntime so that the last look finds it."""
    wheel = tmp_path / f"bundle/wheels/{ONNXRUNTIME}-py3-none-any.whl"
    for folder in ("downloaded", "bundle"):
        (tmp_path / folder).mkdir()
    with zipfile.ZipFile(tmp_path / "downloaded" / wheel.name, "w") as file:
        file.writestr("onnxruntime.py", "made = True\n")
        file.writestr(f"{ONNXRUNTIME}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: onnxruntime\nVersion: {version('onnxruntime')}\n")
        file.writestr(f"{ONNXRUNTIME}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{ONNXRUNTIME}.dist-info/RECORD", "")
    bundle.write_wheels(tmp_path / "downloaded", wheel.parent, Engine())
    borrowed = tmp_path / "borrowed"  # the few packages that the code and pip's start need
    borrowed.mkdir()
    for name in ("pip", "tqdm", "filelock"):
        (borrowed / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    code = ("from pathlib import Path\nfrom src import kaggle\nbundle = Path('bundle').resolve()\n"
            "kaggle.install_wheels(bundle); import onnxruntime; assert onnxruntime.made; kaggle.install_wheels(bundle)")
    python, env = tmp_path / "venv/bin/python", {"PYTHONPATH": f"{Path(kaggle.__file__).parents[1]}:{borrowed}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"installed {ONNXRUNTIME}-py3-none-any.whl\n"
    other = wheel.rename(wheel.with_name("openvino-1.0-cp27-none-win32.whl"))
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("left out: ") == 2 and "not a supported wheel" in done.stdout, "without OpenVINO float32 is left"
    other.rename(wheel.with_name("onnxruntime-1.0-cp27-none-win32.whl"))
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "onnxruntime"], env=env, check=True)
    done = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode and "cannot be installed here" in done.stderr and "not a supported wheel" in done.stderr


def test_what_a_failing_stage_has_written_is_kept(tmp_path, capsys):
    def stage(words):
        assert not out.exists() and words == ["--x", "--out", str(out)]
        out.write_text("half")
        raise MemoryError("no more")

    out = tmp_path / "submission.csv"
    out.write_text("an older one")
    kaggle.attempt(stage, ["--x"], out)
    told = capsys.readouterr()
    assert out.read_text() == "half" and "MemoryError: no more" in told.err and "did not end well (exit code 1)" in told.out


def test_a_stage_in_a_process_of_its_own_finds_what_this_one_finds(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text("import sys, src.kaggle\nsys.exit(src.kaggle.__file__ != sys.argv[1])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert kaggle.aside("elsewhere", kaggle.__file__, seconds=60) == ""


@pytest.mark.parametrize("mount", ["birdclef-2023", "competitions/birdclef-2023"])
def test_the_competition_is_found_under_both_mounts(tmp_path, mount, capsys):
    (tmp_path / "asca-birdclef").mkdir()
    with pytest.raises(UserError, match="attach it to the notebook. There: asca-birdclef"):
        kaggle.find_competition(tmp_path)
    folder = tmp_path / mount
    folder.mkdir(parents=True)
    (folder / "sample_submission.csv").write_text("row_id,a\n")
    assert kaggle.find_competition(tmp_path) == folder == kaggle.find_competition(tmp_path, "birdclef-2023")
    assert not list(kaggle.find_soundscapes(folder).iterdir()) and "not mounted" in capsys.readouterr().out
    other = tmp_path / ("competitions/birdclef-2023" if folder.parent == tmp_path else "birdclef-2023")
    other.parent.mkdir(exist_ok=True)
    other.symlink_to(folder, target_is_directory=True)
    assert kaggle.find_competition(tmp_path).resolve() == folder, "under both mounts it is still one"
    other.unlink()
    shutil.copytree(folder, other)
    assert kaggle.find_competition(tmp_path, "birdclef-2023") in (folder, other), "mounted twice, without a link"
    shutil.rmtree(other)
    shutil.copytree(folder, folder.with_name("birdclef-2024"))
    with pytest.raises(UserError, match="2 competitions"):
        kaggle.find_competition(tmp_path)
    assert kaggle.find_competition(tmp_path, "birdclef-2023") == folder == kaggle.find_competition(tmp_path, year="birdclef-2023")
    assert kaggle.find_competition(tmp_path, "birdclef-2024", year="birdclef-2023").name == "birdclef-2024", "a name that is given comes first"
