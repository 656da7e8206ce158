import base64
import io
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import matplotlib.image
import nbformat
import numpy as np
import pandas as pd
import pytest

from src import explore
from tests.conftest import make_soundscape

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WITHOUT_NETWORK = ["unshare", "-rn", "bash", "-c", 'ip link set lo up && exec "$@"', "bash"]


@cache
def network_can_be_taken_away() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True).returncode == 0


def execute(notebook: Path, folder: Path, result: Path, /, **parameters: object) -> nbformat.NotebookNode:
    """Runs a notebook in `folder` as Kaggle does, with papermill and, where that is permitted, without a network."""
    words = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [*(WITHOUT_NETWORK if network_can_be_taken_away() else []), sys.executable, "-m", "papermill", str(notebook), str(result),
               "--kernel", "python3", "--log-output", "--no-progress-bar", *words]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return nbformat.read(result, 4)


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode) -> list[np.ndarray]:
    data = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(each["image/png"]))) for each in data if "image/png" in each]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_bare_and_hold_no_logic(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3" and notebook.metadata.kernelspec.language == "python"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert not any(line.startswith(("def ", "class ", "while ", "try")) for cell in code for line in cell.source.splitlines())
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1


@pytest.mark.parametrize(("n", "competition", "bundle", "precision"), [
    (0, "birdclef-2023", "asca-birdclef", "f32"), (1, "birdclef-2023", "datasets/someone/asca-birdclef", "bf16"),
    (3, "competitions/birdclef-2023", "datasets/someone/asca-birdclef", "int8")])
def test_the_submission_notebook_runs_from_the_bundle_alone(tmp_path, request, n, competition, bundle, precision):
    data, at, working = tmp_path / "input" / competition, tmp_path / "input" / bundle, tmp_path / "working"
    shutil.copytree(request.getfixturevalue("built") if precision == "f32" else request.getfixturevalue("built_lossy")[precision], at)
    working.mkdir()
    (data / "test_soundscapes").mkdir(parents=True)
    (data / "test_soundscapes/readme.txt").write_text("the hidden soundscapes are mounted when the notebook is scored")
    (data / "sample_submission.csv").write_text("row_id,demowl1,demcuc1,demdov1\nsoundscape_1_5,0,0,0\n")
    for number in range(n):
        make_soundscape(data / f"test_soundscapes/soundscape_{number}.ogg", 10.0 + 5 * number, seed=number)
    rows = [f"soundscape_{k}_{5 * row}" for k in range(n) for row in range(1, 3 + k)]
    if n == 1:
        (working / "timeline").touch()  # in the way of the pictures' folder: the submission stands none the less
    if n == 3:  # a damaged file is as long as its year's, and the mounts of old and new lead to the same
        (data / "test_soundscapes/z.ogg").write_bytes(b"no audio")
        rows += [f"z_{5 * row}" for row in range(1, 13)]
        for new in (data, at):
            (tmp_path / "input" / new.name).symlink_to(new, target_is_directory=True)
    notebook = execute(at / "kaggle_submission.ipynb", working, tmp_path / "out.ipynb", input_root=tmp_path / "input", year="birdclef-2026")
    table, text = pd.read_csv(working / "submission.csv"), printed(notebook)
    assert table.columns.tolist() == ["row_id", "demowl1", "demcuc1", "demdov1"]
    assert table.row_id.tolist() == rows and (n == 3 or f"competition {data}\n" in text)
    assert "golden example: log-mel within" in text and "submission.csv: valid" in text and f"bundle {at}\n" in text
    assert precision != "int8" or "int8: the golden example comes to within" in text and text.count(", int8\n") == 1, "the submission is OpenVINO's"
    assert precision != "bf16" or "bf16: the golden example comes to within" in text or "float32 instead of bf16: " in text
    shown = pictures(notebook)
    assert len(shown) == (n == 3) and all(picture[..., :3].std() > 0.1 for picture in shown)
    if n == 3 and not network_can_be_taken_away():
        pytest.skip("the notebook passed, but with a network: unshare -rn is not permitted here")


def test_the_submission_notebook_stops_at_a_damaged_bundle(tmp_path, built):
    at = Path(shutil.copytree(built, tmp_path / "input/asca-birdclef"))
    content = bytearray((at / "golden/sound.wav").read_bytes())
    content[1000] ^= 1
    (at / "golden/sound.wav").write_bytes(content)
    with pytest.raises(AssertionError, match="sound.wav is damaged"):
        execute(at / "kaggle_submission.ipynb", tmp_path, tmp_path / "out.ipynb", input_root=tmp_path / "input")
    assert not (tmp_path / "submission.csv").exists()


def test_the_tour_of_the_data_draws_and_plays(tmp_path, data):
    notebook = execute(ROOT / "notebooks/explore_data.ipynb", ROOT / "notebooks", tmp_path / "out.ipynb", data=data, n_folds=3, out=tmp_path / "shown")
    assert notebook.metadata.papermill.exception is None
    players = sum("<audio" in str(output.data.get("text/html", "")) for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output)
    assert len(pictures(notebook)) == 6 and players == 3  # one of each species
    assert {path.stem for path in (tmp_path / "shown").glob("*.png")} == {"classes", "durations", "authors", "places", "folds.audit", "examples"}


def test_the_audit_is_of_the_data_s_own_folds(tmp_path, data, fold_table):
    assert fold_table == data / "folds.csv"
    text, picture = explore.audit(data, tmp_path, n_folds=7)
    assert "in 3 folds; the table holds the strategy **established**" in text and picture.parent == tmp_path and picture.exists()


def test_what_the_table_does_not_say_is_left_out_of_its_pictures(tmp_path, data):
    raw = pd.read_csv(data / "train_metadata.csv", dtype=str).assign(author="", latitude="", longitude="")
    raw.loc[:1, ["latitude", "longitude"]] = [["-1.5", "36.8"], ["", "nowhere"]]
    raw.loc[0, "filename"] = "demdov1/absent.ogg"
    raw.to_csv(tmp_path / "train_metadata.csv", index=False)
    table = explore.read(data, tmp_path / "train_metadata.csv")
    assert table.duration_s.notna().sum() == len(raw) - 1
    assert table.latitude.dropna().to_dict() == {0: -1.5} and table.longitude.dropna().to_dict() == {0: 36.8}
    facts = explore.summary(table)[""]
    assert facts["with a place"] == "1" and facts["recordists"] == f"0; {len(raw)} recordings have none"
    odd = table.assign(duration_s=[0.0] + [2.0] * (len(table) - 1), latitude=90.0, longitude=[500.0] + [180.0] * (len(table) - 1))
    for draw in (explore.draw_durations, explore.draw_places):
        assert draw(tmp_path / "odd.png", odd).exists()
    nothing = table.assign(duration_s=np.nan, latitude=np.nan)
    for draw in (explore.draw_durations, explore.draw_authors, explore.draw_places):
        assert draw(tmp_path / "nothing.png", nothing).exists()
