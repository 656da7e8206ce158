"""The house: imports point down, the README shows the tree as it is, a full disk leaves nothing half-written."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from src.__main__ import AROUND, STAGES
from src.console import UserError, resumable, stage
from src.storage import atomic, atomic_folder, original_cell, safe_cell

ROOT = Path(__file__).parents[1]
FLOORS = (
    {"console", "config", "containers", "storage", "settings", "competitions", "deadline"},
    {"audio", "metrics", "metadata", "submission", "plots", "checkpoint", "demo_data", "onnx_models", "run_config", "engines", "soundscapes",
     "scoring", "species", "detections"},
    {"prepare", "sources", "folds", "folds_audit", "cache", "augment", "waveforms", "dataset", "models", "predict", "mistakes", "losses", "devices",
     "cuda_graphs", "train_settings", "optimiser", "soft_labels", "initialise", "weight_noise"},
    {"train", "fold_training", "report", "evaluate", "export", "infer"},
    {"network_cost", "paper_tables", "recipe_table", "experiment_results", "experiment_training", "experiment_report", "experiments"},
    {"precision", "timeline", "distil", "kaggle", "golden", "bundle", "explore", "demo", "__main__"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports_of(file: Path) -> set[str]:
    """The project's own modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if file.parent.name != "src" and node.level == 1:
                continue
            found |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
    return found


def test_imports_point_down_or_sideways_without_a_circle():
    modules = {file.stem: imports_of(file) for file in (ROOT / "src").glob("*.py") if file.stem != "__init__"}
    for package in ("models", "sources"):
        modules[package] = set().union(*(imports_of(file) for file in (ROOT / "src" / package).glob("*.py")))
    assert set(modules) == set(FLOOR)
    for name, imported in modules.items():
        assert all(FLOOR[other] <= FLOOR[name] for other in imported), name
    assert not any(FLOOR[other] > 1 for other in modules["infer"] - {"infer"}), "inference stands on floors 0 and 1 alone"

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {path + (name,)}"
        for other in modules[name]:
            visit(other, (*path, name))

    for name in modules:
        visit(name, ())


def test_readme_s_tree_names_every_file_and_no_other():
    tree = re.search(r"## The tree\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    named, folders = set(), []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 2]
        path = "/".join(["", *folders, name]).lstrip("/").replace("//", "/")
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
        named.add(path)
    missing = [path for path in named if not (ROOT / path).exists() and not path.startswith("runs")]
    assert not missing, f"the README names what is not there: {missing}"
    sources = {str(p.relative_to(ROOT)) for folder in ("src", "benchmarks") for p in (ROOT / folder).rglob("*.py")} | {
        str(p.relative_to(ROOT)) for p in (ROOT / "src/recipes").glob("*.yaml")}
    unnamed = {path for path in sources if not path.endswith("__init__.py")} - named
    assert not unnamed, f"the README's tree lacks {sorted(unnamed)}"


@pytest.mark.parametrize("name", [*(f"src.{stage}" for stage in STAGES + AROUND),
                                  *sorted(f"benchmarks.{path.stem}" for path in (ROOT / "benchmarks").glob("*.py") if path.stem != "__init__")])
def test_every_stage_and_benchmark_tells_its_settings_and_does_no_more(name, capsys):
    module = importlib.import_module(name)
    if name.startswith("src.") or hasattr(module, "main"):
        with pytest.raises(SystemExit) as ended:
            module.main(["--help"])
        assert not ended.value.code and f"usage: python -m {name}" in capsys.readouterr().out


def test_the_stages_are_printed_in_order():
    text = subprocess.run([sys.executable, "-m", "src"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    places = [text.index(f"src.{stage} ") for stage in ("folds", "cache", "train", "evaluate", "export", "infer")]
    assert places == sorted(places)


def test_what_cannot_be_written_leaves_nothing_under_the_final_name(tmp_path):
    (tmp_path / "x.csv").write_text("old")
    with pytest.raises(UserError, match="cannot write .*x.csv"), atomic(tmp_path / "x.csv") as partial:
        partial.write_text("half")
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "x.csv") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"] and (tmp_path / "x.csv").read_text() == "old"


@pytest.mark.parametrize("text", ["=cmd.wav", "-1.ogg", "'apapane/XC1.ogg", "plain.ogg", "'", ""])
def test_a_cell_that_is_no_formula_any_more_can_be_read_back(text):
    assert not safe_cell(text).startswith(("=", "-")) and original_cell(safe_cell(text)) == text


def test_a_folder_is_replaced_whole_and_a_link_s_target_is_left_alone(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/old").touch()
    with pytest.raises(UserError, match="cannot write .*x"), atomic_folder(tmp_path / "x") as partial:
        (partial / "half").touch()
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.rglob("*")] == ["x", "old"]
    (tmp_path / "link").symlink_to(tmp_path / "x", target_is_directory=True)
    for name in ("link", "x"):
        with atomic_folder(tmp_path / name) as partial:
            (partial / "new").touch()
        assert [p.name for p in (tmp_path / name).iterdir()] == ["new"] and (tmp_path / "x/old").exists() == (name == "link")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "x"] and not (tmp_path / "link").is_symlink()


def test_an_interrupted_stage_promises_no_more_than_it_keeps(capsys):
    def work(argv):
        raise KeyboardInterrupt

    for wrapped, words in ((stage(work), "the same command begins anew"), (resumable(work), "the same command continues")):
        assert wrapped([]) == 130 and words in capsys.readouterr().err
    assert resumable(work)(["--restart"]) == 130 and "the same command without --restart continues" in capsys.readouterr().err
