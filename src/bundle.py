"""BUNDLE: runs/<run>/ -> one folder that is a Kaggle data set: models, source, wheels, a golden example and every file's SHA-256."""

from __future__ import annotations

import ast
import re
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from . import competitions, demo_data, engines, golden, kaggle
from .console import UserError, say, stage
from .engines import Engine
from .onnx_models import find_models
from .settings import parse
from .storage import atomic_folder, sha256, write_json, write_text

ROOT = Path(__file__).parents[1]
ENTRIES = ("kaggle", "golden", "infer", "timeline")  # what the notebook calls
NOTEBOOK = "kaggle_submission.ipynb"
RESERVE_MINUTES = 10  # of the competition's limit, for what the notebook does beside scoring
METADATA = ("dataset-metadata.json", "kernel-metadata.json")  # the kaggle command reads these and does not upload them
KAGGLE_PYTHON, PLATFORM = "3.12", "manylinux_2_28_x86_64"
GOLDEN_SECONDS = 8.0  # two rows, the second one padded


@dataclass(frozen=True)
class BundleSettings:
    run: tuple[Path, ...] = (Path("runs/asca"),)
    """Runs whose folds are averaged."""
    out: Path = Path("submissions/kaggle")
    """The folder to upload; an older bundle there is replaced."""
    wheels: Path | None = None
    """Folder of wheels for Kaggle's Python; without it the command that downloads them is printed."""
    precision: Literal["f32", "bf16", "int8"] = "f32"
    """bf16, int8: computed by OpenVINO as src.precision accepted it here; the notebook falls back on f32 where Kaggle's processor cannot."""
    owner: str = "YOUR-KAGGLE-NAME"
    """Your user name on Kaggle."""
    title: str = "ASCA BirdCLEF"
    """The data set's; the notebook adds " submission". In lower case with hyphens it is the address."""
    competition: str = competitions.DEFAULT
    """The year that the notebook is for; its name and its time limit are written into it."""
    licence: str = "other"
    """Of the data set, by Kaggle's names; `other` is what its description says."""


def sources(package: Path, entries: tuple[str, ...]) -> list[str]:
    """The files of the modules `entries` and of all that they import from the package, anywhere in them."""
    found, todo = {"__init__"}, list(entries)
    while todo:
        name = todo.pop()
        if name in found or not (package / f"{name}.py").exists():
            continue
        found.add(name)
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                todo += [node.module] if node.module else [alias.name for alias in node.names]
    return sorted(f"{name}.py" for name in found)


def write_models(runs: tuple[Path, ...], out: Path, engine: Engine) -> list[str]:
    """Every fold's model.onnx, its digest and what a lossy precision needs beside it; what is not exported yet is exported first.

    Returns the runs' names, in their order.
    """
    names = [run.resolve().name for run in runs]
    if not names:
        raise UserError("--run names no run")
    if len(set(names)) < len(names):
        raise UserError(f"--run: two runs are named {max(names, key=names.count)}; rename one")
    for run, name in zip(runs, names):
        for model in find_models([run], threads=1):
            files = [model.path, model.path.with_name(model.path.name + ".sha256")]
            if engine.lossy:
                engines.require_verdict(model.path, engine)
                files += engines.evidence(model.path, engine)
            for file in files:
                copy = out / name / file.relative_to(run)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
    find_models([out / name for name in names], threads=1)  # the copies open, and all know the same species
    return names


def write_golden(folder: Path, runs: list[str]) -> None:
    """A made sound (so of no one's licence) and what these models make of it."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    sound = demo_data.noise(GOLDEN_SECONDS, "wind", rng) * 0.01
    for start, species in zip((0.5, 3.0, 5.5), demo_data.SPECIES[2:]):
        demo_data.sing(sound, species, start, 0.2, rng)
    soundfile.write(folder / golden.SOUND, np.clip(sound, -1, 1), demo_data.RATE, subtype="PCM_16")  # every version decodes it to the same samples
    log_mel, table = golden.compute(folder, runs)
    np.save(folder / golden.LOG_MEL, log_mel)
    table.to_csv(folder / golden.SUBMISSION, float_format="%.9g", lineterminator="\n")


def kaggle_tags() -> frozenset[Tag]:
    """What a wheel may be built for to be installed by Kaggle's Python."""
    python, newest = tuple(map(int, KAGGLE_PYTHON.split("."))), int(PLATFORM.split("_")[2])
    platforms = [*(f"manylinux_2_{glibc}_x86_64" for glibc in range(newest, 4, -1)), "manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64",
                 "linux_x86_64"]
    interpreter = "cp" + KAGGLE_PYTHON.replace(".", "")
    return frozenset([*cpython_tags(python, [interpreter], platforms), *compatible_tags(python, interpreter, platforms)])


def write_wheels(wheels: Path, out: Path, engine: Engine) -> None:
    files, tags, versions = sorted(wheels.glob("*.whl")), kaggle_tags(), {}
    for file in files:
        try:
            package, number, _, own = parse_wheel_filename(file.name)
        except InvalidWheelFilename:
            own = frozenset()
        if tags.isdisjoint(own):
            raise UserError(f"--wheels: {file} is none for Kaggle's Python {KAGGLE_PYTHON} and {PLATFORM}; delete it and run: {download_command(engine)}")
        if versions.setdefault(package, number) != number:
            raise UserError(f"--wheels {wheels} holds {package} {versions[package]} and {number}; delete the one that is not meant")
    for package in needed(engine):  # the golden example, and a lossy precision's verdict, hold for one version
        if str(versions.get(package, "")) != version(package):
            raise UserError(f"--wheels {wheels} holds no wheel of {package} {version(package)}; download it with: {download_command(engine)}")
    out.mkdir()
    for file in files:
        shutil.copyfile(file, out / file.name)


def needed(engine: Engine) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("onnxruntime", engine.name)))


def download_command(engine: Engine) -> str:
    """Fetches what computes the models and Kaggle's image lacks."""
    packages = " ".join(f"{name}=={version(name)}" for name in needed(engine))
    return f"pip download {packages} --python-version {KAGGLE_PYTHON} --only-binary=:all: --platform {PLATFORM} --no-deps -d input/wheels"


def write_notebook(out: Path, competition: str) -> None:
    """The notebook, with the competition's name and the minutes that its limit leaves."""
    text, limit = (ROOT / "notebooks" / NOTEBOOK).read_text(encoding="utf-8"), competitions.competition(competition).cpu_minutes
    text = text.replace(f'year = \\"{competitions.DEFAULT}\\"', f'year = \\"{competition}\\"')
    write_text(out / NOTEBOOK, re.sub(r"minutes = \d+  # of the \d+", f"minutes = {limit - RESERVE_MINUTES:g}  # of the {limit:g}", text))


def write_metadata(out: Path, settings: BundleSettings) -> None:
    """What the kaggle command reads, in its own words: dataset-metadata.json and kernel-metadata.json."""
    slug = re.sub("[ -]+", "-", settings.title.lower())
    write_json(out / METADATA[0], {
        "title": settings.title, "id": f"{settings.owner}/{slug}", "licenses": [{"name": settings.licence}],
        "description": "ASCA models for BirdCLEF with the code that runs them on a CPU without internet. The code's licence is in LICENSE; "
                       "the models are under the terms of the recordings that they were trained on."})
    write_json(out / METADATA[1], {
        "id": f"{settings.owner}/{slug}-submission", "title": f"{settings.title} submission", "code_file": NOTEBOOK, "language": "python",
        "kernel_type": "notebook", "is_private": True, "enable_gpu": False, "enable_internet": False,
        "dataset_sources": [f"{settings.owner}/{slug}"], "competition_sources": [settings.competition]})


def write_manifest(out: Path) -> int:
    """sha256sum's format over every file that is uploaded; returns their number."""
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path.name not in METADATA)
    odd = [name for name in names if not re.fullmatch(r"[A-Za-z0-9._/-]+", name)]
    if odd:
        raise UserError(f"{odd[0]}: Kaggle wants names of ASCII letters, digits, dot, hyphen and underscore; rename the run or the wheel")
    write_text(out / kaggle.MANIFEST, "".join(f"{sha256(out / name)}  {name}\n" for name in names))
    return len(names) + 1


def choose_engine(precision: str) -> Engine:
    """What the bundle asks for. This processor need not compute in bfloat16 itself. Raises UserError where OpenVINO is not installed."""
    if precision == "f32":
        return Engine()
    engines.choose("openvino", "f32")
    return Engine("openvino", precision)


def build(settings: BundleSettings, engine: Engine, out: Path) -> int:
    """Fills the new folder `out` and returns the number of files to upload."""
    (out / "src").mkdir()
    for name in sources(ROOT / "src", ENTRIES):
        shutil.copyfile(ROOT / "src" / name, out / "src" / name)
    shutil.copyfile(ROOT / "LICENSE", out / "LICENSE")
    write_notebook(out, settings.competition)
    write_json(out / kaggle.SETTINGS, {"precision": settings.precision, "runs": write_models(settings.run, out / "runs", engine)})
    write_golden(out / "golden", kaggle.runs(out))
    if settings.wheels:
        write_wheels(settings.wheels, out / "wheels", engine)
    write_metadata(out, settings)
    n_files = write_manifest(out)
    kaggle.verify(out)
    return n_files


@stage
def main(argv: list[str] | None = None) -> None:
    settings = parse(BundleSettings, argv, prog="python -m src.bundle", description=__doc__)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 -]{4,37}[A-Za-z0-9]", settings.title):
        raise UserError(f"--title {settings.title!r}: 6 to 39 ASCII letters, digits, spaces and hyphens (Kaggle takes 50 with \" submission\")")
    if not re.fullmatch(r"[A-Za-z0-9-]+", settings.owner):
        raise UserError(f"--owner {settings.owner!r} is no user name on Kaggle: letters, digits and hyphens")
    out, engine = settings.out, choose_engine(settings.precision)
    if out.is_file() or out.is_dir() and any(out.iterdir()) and not (out / kaggle.MANIFEST).exists():
        raise UserError(f"{out} is there and is no bundle; name another --out")
    with atomic_folder(out) as partial:
        n_files = build(settings, engine, partial)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    say(f"wrote {out}: {n_files} files to upload, {size / 1e6:.1f} MB. Upload it, and then the notebook:\n"
        f"  kaggle datasets create -p {out} -r zip\n  kaggle kernels push -p {out}")
    if settings.owner == BundleSettings.owner:
        say("first name yourself: run this again with --owner <your user name on Kaggle>")
    if not settings.wheels:
        say(f"without wheels: Kaggle's image lacks {'onnxruntime and OpenVINO' if engine.lossy else 'onnxruntime'}; download and run this again with "
            f"--wheels input/wheels\n  {download_command(engine)}")


if __name__ == "__main__":
    sys.exit(main())
