"""A notebook on Kaggle: where its data are mounted, whether its bundle is whole, and the wheels that the image lacks."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from .console import UserError, say
from .storage import sha256

MANIFEST = "manifest.sha256"  # as sha256sum writes it
SETTINGS = "settings.json"  # what src.bundle was told
COMPETITION_MOUNTS = ("*", "competitions/*")  # below /kaggle/input: the older layout, the newer
PACKAGES = ("numpy", "scipy", "pandas", "librosa", "soundfile", "soxr", "onnxruntime", "openvino", "matplotlib", "tqdm", "filelock")


def describe() -> None:
    """Prints the versions and the processor: what to look at first when two machines disagree."""
    say(f"Python {platform.python_version()}, {os.cpu_count()} core(s), {platform.platform()}")
    say(", ".join(f"{name} {_version(name) or 'absent'}" for name in PACKAGES))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def verify(bundle: Path) -> None:
    """Reads every file of the manifest back. Raises UserError with the first that is missing or differs, or is one more than it lists."""
    try:
        lines = (bundle / MANIFEST).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{bundle / MANIFEST} is not readable ({error}); upload the bundle again") from error
    for line in lines or [""]:
        entry = re.fullmatch(r"([0-9a-f]{64})  ([!-~]+)", line)
        if not entry:
            raise UserError(f"{bundle / MANIFEST} is damaged at {line[:80]!r}; upload the bundle again")
        digest, path = entry[1], bundle / entry[2]
        if not path.is_file():
            raise UserError(f"{path} is missing; upload the bundle again, with its folders (kaggle datasets create -r zip)")
        if sha256(path) != digest:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}; upload the bundle again")
    listed = {line[66:] for line in lines}
    for path in sorted(path for part in ("runs", "src", "golden") for path in (bundle / part).rglob("*") if path.is_file()):
        if path.relative_to(bundle).as_posix() not in listed and "__pycache__" not in path.parts:
            raise UserError(f"{path} is not in {MANIFEST}: one of the two is not of this bundle; upload the bundle again")
    say(f"{bundle}: {len(lines)} files, all as they were built")


def install_wheels(bundle: Path) -> None:
    """Installs the bundle's wheels of packages that are absent, without a network; what is installed stays as it is.

    Raises UserError where onnxruntime is missing in the end. Any other wheel that does not fit is named and left out: without OpenVINO
    the models are computed in float32.
    """
    for wheel in sorted((bundle / "wheels").glob("*.whl")):
        name = wheel.name.split("-")[0]
        if _version(name):
            continue
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            failure = (f"{wheel} cannot be installed here (Python {platform.python_version()}): {(done.stderr.strip() or 'pip says nothing').splitlines()[0]}; "
                       "download the wheel of this Python and build the bundle with it (src.bundle --wheels)")
            if name == "onnxruntime":
                raise UserError(failure)
            say(f"left out: {failure}")
            continue
        importlib.invalidate_caches()  # the kernel runs already
        say(f"installed {wheel.name}")
    if find_spec("onnxruntime") is None:
        raise UserError(f"onnxruntime is not installed and {bundle} holds no wheel of it; build the bundle with src.bundle --wheels")


def find_competition(root: Path, slug: str = "", year: str = "") -> Path:
    """The competition's folder: the one with a sample submission, of that slug where one is given; of several the one named as the year.

    Raises UserError with what is there.
    """
    samples = [sample for mount in COMPETITION_MOUNTS for sample in root.glob(f"{mount}/sample_submission.csv") if slug in ("", sample.parent.name)]
    found = sorted({sample.parent.resolve(): sample.parent for sample in samples}.values())  # one, though it lies under both mounts
    named = [folder for folder in found if folder.name in (slug, year)]
    if len(found) == 1 or named:  # of one name they are the same data, mounted twice
        return (named or found)[0]
    if found:
        raise UserError(f"{len(found)} competitions lie under {root}: {', '.join(folder.name for folder in found)}; "
                        "name one in the notebook's parameter `competition`")
    there = ", ".join(str(folder.relative_to(root)) for mount in ("*", "*/*") for folder in sorted(root.glob(mount)) if folder.is_dir())
    raise UserError(f"no competition {slug or 'with a sample_submission.csv'} under {root}; attach it to the notebook. There: {there or 'nothing'}")


def find_soundscapes(competition: Path) -> Path:
    """The folder of test soundscapes; an empty one where the competition mounts none before it scores."""
    folder = competition / "test_soundscapes"
    if folder.is_dir():
        return folder
    say(f"{folder} is not mounted: going on with no soundscape at all, which makes a submission of the header alone")
    return Path(tempfile.mkdtemp(prefix="no_soundscapes_"))


def attempt(stage: Callable[[list[str]], int], words: list[str], out: Path | str) -> None:
    """Runs a stage here that writes `out`. Whatever goes wrong is told and does not end the notebook: what was written by then may do, which its
    check says. What stood there before is deleted, so that it cannot pass for this stage's."""
    Path(out).unlink(missing_ok=True)
    try:
        code = stage([*words, "--out", str(out)])
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        say(f"the stage did not end well (exit code {code}); what it had written to {out} stays")


def aside(module: str, *words: str, seconds: float) -> str:
    """Runs a stage in a process of its own, so that neither its crash nor its hang ends the notebook. Returns what went wrong; "" where nothing did."""
    this_code = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))}
    try:
        done = subprocess.run([sys.executable, "-P", "-m", module, *words], capture_output=True, text=True, timeout=seconds, env=this_code)
    except subprocess.TimeoutExpired:
        return f"{module} took longer than {seconds:g} s"
    return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1] if done.returncode else ""


def _settings(bundle: Path) -> dict:
    return json.loads((bundle / SETTINGS).read_text(encoding="utf-8"))


def precision(bundle: Path) -> str:
    """What the bundle was built for, as `src.infer --precision` takes it."""
    return _settings(bundle)["precision"]


def runs(bundle: Path) -> list[str]:
    """The bundle's runs, as `src.infer --run` takes them: in the order that src.bundle was told, since the last ones are dropped first."""
    return [str(bundle / "runs" / name) for name in _settings(bundle)["runs"]]
