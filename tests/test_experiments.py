"""The paper's tables on made data: real trainings in worker processes, interrupted, continued, failed, carried to another place."""

import contextlib
import io
import multiprocessing
import os
import re
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score

from src import experiments, folds
from src.console import UserError
from src.dataset import BalancedSampler, nested_share
from src.experiment_report import DataTable, interval, interval_of_whole_seeds
from src.experiment_results import SPEED, Results, read_table
from src.experiment_training import Workers
from src.experiments import ExperimentSettings, Plan, open_data, train_all
from src.metadata import read_metadata
from src.paper_tables import BUDGETS, FULL, PAPER, SMALL, Row, read_flags
from src.recipe_table import recipe_table, sizes_table
from src.run_config import read_config
from src.settings import flatten
from src.train_settings import TrainSettings
from tests.conftest import make_data

TINY = ("--budget", "small", "--input-side", "64", "--epochs", "1", "--jobs", "1", "--device", "cpu")


@pytest.fixture(scope="module")
def birds(tmp_path_factory):
    """A data set with folds of its own."""
    root = tmp_path_factory.mktemp("sets") / "birds"
    make_data(root)
    assert folds.main(["--data", str(root), "--out", str(root / "folds.csv"), "--n-folds", "3"]) == 0
    return root


@pytest.fixture(scope="module")
def flags(birds):
    root = birds.parent
    return ["--data", str(birds), *TINY, "--runs", str(root / "runs"), "--cache", str(root / "cache"), "--results", str(root / "results")]


@pytest.fixture(scope="module")
def done(birds, flags):
    """Table 2, interrupted after its first fold and continued; what each call said and left."""
    said, table, over = [], birds.parent / "results/experiments.csv", threading.Event()

    def interrupt() -> None:
        while not table.exists() and not over.wait(0.01):
            pass
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    for _ in range(2):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = experiments.main(["table2", *flags])
        over.set()
        said.append((out.getvalue(), code, pd.read_csv(table)))
    return said


def test_an_interrupted_table_goes_on(birds, done):
    (_, code, first), (said, last_code, last) = done
    assert code == 143 and 1 <= len(first) < 6
    assert f"6 folds of 3 runs, {len(first)} finished, {6 - len(first)} to train" in said and last_code == 0 and len(last) == 6
    columns = ["key", "seed", "fold", "top1", "train_seconds"]
    assert first[columns].merge(last[columns]).equals(first[columns]), "finished folds were trained again"
    assert not list((birds.parent / "runs").rglob("weights.safetensors")) and not list((birds.parent / "runs").rglob("*.partial"))
    assert not multiprocessing.active_children()


def test_the_table_s_numbers_are_those_of_the_predictions(birds, done):
    results, metadata = birds.parent / "results", pd.read_csv(birds / "train_metadata.csv").set_index("filename").primary_label
    table = pd.read_csv(results / "table2_small.csv")
    scores, right, split = {}, {}, done[-1][2]["split"].iloc[0]
    for row, key in done[-1][2].groupby("row").key.first().items():
        for fold in (0, 1):
            oof = pd.read_csv(birds.parent / f"runs/birds/asca_test-{key}-{split}-seed0/fold{fold}/oof.csv", index_col=0)
            truth = np.array([[label == name for name in oof] for label in metadata.loc[oof.index]])
            hits = truth[np.arange(len(oof)), oof.to_numpy().argmax(axis=1)]
            right.setdefault(row, []).extend(hits)
            scores.setdefault(row, []).append((hits.mean(), average_precision_score(truth, oof)))
    for place, metric in enumerate(("top1", "macro_ap")):
        for row, values in scores.items():
            got = table[(table.row == row) & (table.metric == metric)].iloc[0]
            mine, base = np.array(values)[:, place], np.array(scores["C-C-C-T (ASCA)"])[:, place]
            assert got["mean"] == pytest.approx(mine.mean(), abs=1e-5) and got.trainings == 2
            if row != "C-C-C-T (ASCA)":
                assert got.difference == pytest.approx((mine - base).mean(), abs=1e-5) and np.isnan(got.difference_low)  # two are too few
                gain = np.subtract(right[row], right["C-C-C-T (ASCA)"], dtype=float)
                if metric == "top1":  # the normal approximation stands for the bootstrap
                    assert (got.over_recordings, got.over_recordings_difference) == pytest.approx((np.mean(right[row]), gain.mean()), abs=1e-5)
                    width = got.over_recordings_difference_high - got.over_recordings_difference_low
                    assert width == pytest.approx(2 * 1.96 * gain.std() / len(gain) ** 0.5, rel=0.2, abs=1 / len(gain))  # its values are whole n-ths
    text = (results / "table2_small.md").read_text()
    assert "`python -m src.experiments table2 --budget small --epochs 1 --input-side 64 --data input/birds`" in text
    assert "# Table 2: layouts (small budget: each smallest variant, 64 x 64, 1 epoch in batches of 8, 2 folds, 1 seed)" in text
    assert "| C-C-T-T | 2 |" in text and "| 75.3 |" in text and (results / "table2_small.png").stat().st_size > 5000


def test_results_are_carried_to_another_place(birds, done, tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(birds.parent / "results/experiments.csv", results)
    there = ["--runs", str(tmp_path / "runs"), "--cache", str(birds.parent / "cache"), "--results", str(results)]
    assert experiments.main(["table2", "--data", str(birds), *TINY, *there]) == 0
    assert "6 finished, 0 to train" in capsys.readouterr().out
    for name in ("table2_small.md", "table2_small.csv"):
        assert (results / name).read_bytes() == (birds.parent / "results" / name).read_bytes()
        (results / name).unlink()
    assert experiments.main(["table2", *TINY, "--only-report", "--results", str(results)]) == 0  # without the data
    assert (results / "table2_small.csv").read_bytes() == (birds.parent / "results/table2_small.csv").read_bytes()
    assert experiments.main(["all", *TINY, "--only-report", "--results", str(results)]) == 0
    for name, shown in (("table1", "| ASCA | 2 |"), ("figure2", "| ASCA | 2 |"), ("section42", "| no SpecAugment | 0 of 2 |")):
        assert shown in (results / f"{name}_small.md").read_text() and (results / f"{name}_small.png").stat().st_size > 5000
    assert pd.read_csv(results / "table1_small.csv").query("row == 'AST'")["paper, VGG-Sound, mAP %"].tolist() == [78.1] * 5
    assert experiments.main(["figure3", *TINY, "--only-report", "--speed", "--results", str(results)]) == 0
    assert "onnxruntime float32" in (results / "figure3_small.md").read_text() and pd.read_csv(results / "figure3_small.csv").windows_per_second.min() > 1
    assert "| 16 x 16 | 0 of 2 | – |" in (results / "figure3_small.md").read_text() and "| 32 x 32 | 2 |" in (results / "figure3_small.md").read_text()


def test_rows_that_come_meanwhile_stay_and_torn_doubled_or_foreign_ones_are_named(birds, done, tmp_path):
    file = Path(shutil.copy(birds.parent / "results/experiments.csv", tmp_path))
    mine, theirs = Results(tmp_path), Results(tmp_path)
    row = mine.table.iloc[0].to_dict()
    theirs.add(row | {"seed": 77})
    mine.add(row | {"seed": 78})
    assert set(Results(tmp_path).table.seed) == {0, 77, 78} and len(Results(tmp_path).table) == 8
    header, first, *rest = file.read_text().splitlines()
    assert first.rsplit(",", 1)[1], "its top-1 recording by recording"
    turned = f"{int(first[-2:], 16) ^ 0xFF:02x}"
    for line, problem in ((first[:-1], "is not whole"), (first[:-2] + turned, "is not whole"), (first[:90], "is not whole"),
                          (f"{first}\n{first}", "stands there twice"), (first.replace(row["split"], "0" * 10), "is of another split")):
        file.write_text("\n".join([header, line, *rest, ""]))
        with pytest.raises(UserError, match=f"experiments.csv, line [23]: the row {re.escape(row['row'])}, birds, seed 0.*{problem}"):
            Results(tmp_path)


def test_weights_that_are_kept_are_kept_for_good(birds, done, tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    shutil.copy(birds.parent / "results/experiments.csv", results)
    left = [shutil.copytree(folder, tmp_path / "runs" / folder.relative_to(birds.parent / "runs")) / "weights.safetensors"
            for folder in sorted((birds.parent / "runs").rglob("fold0"))[:2]]
    flags = ["table2", "--data", str(birds), *TINY, "--runs", str(tmp_path / "runs"), "--cache", str(birds.parent / "cache"), "--results", str(results)]
    left[0].touch()
    assert experiments.main([*flags, "--keep-weights"]) == 0
    left[1].touch()  # an interruption's
    assert experiments.main(flags) == 0 and "6 finished, 0 to train" in capsys.readouterr().out
    assert left[0].exists() and not left[1].exists()


def test_other_folds_under_the_same_name_are_refused(birds, done, tmp_path, capsys):
    other = tmp_path / "birds"
    shutil.copytree(birds, other)
    table = pd.read_csv(other / "folds.csv")
    table.assign(fold=(table.fold + 1) % 3).to_csv(other / "folds.csv", index=False)
    assert experiments.main(["table2", "--data", str(other), *TINY, "--runs", str(tmp_path / "runs"), "--cache", str(birds.parent / "cache"),
                             "--results", str(birds.parent / "results")]) == 1
    assert "scores of another data set, split or audio recipe under the name birds" in capsys.readouterr().err


def test_pre_training_goes_before_and_what_fails_or_dies_costs_itself_alone(birds, tmp_path, capsys):
    shutil.copytree(birds, tmp_path / "more")
    settings = ExperimentSettings(jobs=1, device="cpu", runs=tmp_path / "runs", cache=tmp_path / "cache", results=tmp_path / "results")
    data = {folder.name: open_data(settings, folder, None, 1) for folder in (birds, tmp_path / "more")}
    table = PAPER["figure2"](replace(SMALL, side=64, epochs=1), list(data))
    rows = tuple(row for row in table.rows if row.name in ("ASCA from more, 50%", "ASCA, 50%"))
    plan = Plan(settings, [replace(table, rows=tuple(replace(row, data="birds") if row.name == "ASCA, 50%" else row for row in rows))], data, (0,), set())
    tuned = next(job for job in plan.todo.values() if job.needs)
    assert len(plan.todo) == 3 and tuned.needs.cell.data == "more" and tuned.needs.argv[-2:] != tuned.argv[-2:]
    workers = Workers(1)
    workers.submit(tuned.needs)
    for process in workers.processes:
        os.kill(process.pid, signal.SIGKILL)
    assert workers.next() == [(tuned.needs, None)] and len(workers.idle) == 1
    full = next(job for job in plan.todo.values() if not job.needs and job.cell.data == "birds")
    full.folder.mkdir(parents=True)
    full.log.symlink_to("/dev/full")
    workers.submit(full)
    assert workers.next() == [(full, None)] and len(workers.idle) == 1 and f"{full.log}: No space left" in capsys.readouterr().out
    full.log.unlink()
    workers.close()
    bad, results = next(job for job in plan.todo.values() if not job.needs and job.cell.data == "birds"), Results(settings.results)
    bad.folder.mkdir(parents=True, exist_ok=True)
    (bad.folder / "checkpoint.safetensors").write_text("no tensors")
    assert train_all(plan, results) == [bad] and len(results.table) == 2 and not multiprocessing.active_children()
    said = capsys.readouterr().out
    assert f"failed: ASCA, 50% on birds, seed 0, fold 0; see {bad.log}: " in said and "checkpoint.safetensors is damaged" in said
    assert f"the weights begin from {tuned.needs.weights}" in tuned.log.read_text()
    left = {path.name for path in tuned.folder.iterdir()}
    assert {"oof.csv", "history.csv", "timing.json", "config.yaml", "log.txt"} <= left and not any(name.endswith((".png", ".safetensors")) for name in left)
    assert results.table.set_index("data").training.to_dict() == {"birds": 12, "more": 6} and read_config(tuned.needs.folder)["recordings"]["training"] == 6


def test_shares_are_nested_stratified_and_keep_the_number_of_steps(birds):
    table = read_metadata([birds]).table
    kept = {share: set(nested_share(table, share, 3).filename) for share in (0.01, 0.34, 0.5, 1.0)}
    assert [len(names) for names in kept.values()] == [3, 6, 9, 18]
    assert kept[0.01] < kept[0.34] < kept[0.5] < kept[1.0] and kept[0.5] != set(nested_share(table, 0.5, 4).filename)
    assert set(nested_share(table, 0.34, 3).primary_label) == set(table.primary_label)
    without_one = table[table.filename != min(kept[1.0] - kept[0.5])]
    assert set(nested_share(without_one, 0.5, 3).filename) <= kept[0.5] | kept[1.0]
    sampler = BalancedSampler(np.ones(3), 6, 0, n_crops=18)
    assert [len(batch) for batch in sampler] == [6, 6, 6]


def test_rows_that_train_the_same_are_one_run_and_every_row_s_flags_are_known():
    for budget in BUDGETS.values():
        tables = {name: make(budget, ["esc10", "birds"]) for name, make in PAPER.items()}
        base = tables["table1"].rows[5].key("birds", {"birds"})
        for name, row in (("table2", "C-C-C-T (ASCA)"), ("figure2", "ASCA"), ("figure3", "32 x 32"), ("section42", "ASCA")):
            assert {one.name: one for one in tables[name].rows}[row].key("birds", {"birds"}) == base
        keys = [row.key("birds", {"birds"}) for table in tables.values() for row in table.of("birds")]
        assert len(set(keys)) == len(keys) - 5  # four times ASCA, once the baseline
        silent = {row.name: row for row in tables["section42"].rows}["no background noise"]
        assert silent.key("birds", {"birds"}) != base and silent.key("esc10", {"birds"}) == tables["table1"].rows[5].key("esc10", {"birds"})
    assert Row("x", ("--epochs", "3", "--seed", "5", "--device", "cpu")).key("a", ()) == Row("y", ("--epochs", "3")).key("a", ())
    assert 2 * FULL.epochs == read_flags(()).epochs
    with pytest.raises(UserError, match="src.train does not take --no-such-flag"):
        read_flags(("--no-such-flag", "1"))


def test_intervals_are_student_s():
    values = np.array([0.2, 0.4, 0.35, 0.3])
    mean, low, high = interval(values)
    assert (low, high) == pytest.approx(tuple(stats.ttest_1samp(values, 0).confidence_interval())) and mean == pytest.approx(0.3125)
    assert np.isnan(interval(values[:1])[1:]).all() and np.isnan(interval(values[:0])).all()
    cells = pd.MultiIndex.from_product([(0, 1, 2), range(4)], names=("seed", "fold"))
    by_training = pd.Series([*values, *(values + 0.02)[::-1], *[np.nan] * 4], cells)
    of_folds = tuple(stats.ttest_1samp((values + values[::-1] + 0.02) / 2, 0).confidence_interval())  # seeds share a fold's recordings
    assert interval_of_whole_seeds(by_training, 4) == pytest.approx((mean + 0.01, *of_folds))  # the third seed has no training yet
    by_training.iloc[8] = mean + 0.1
    assert interval_of_whole_seeds(by_training, 4)[0] == pytest.approx(mean + 0.02) and np.isnan(interval_of_whole_seeds(by_training, 4)[1:]).all()
    assert np.isnan(interval_of_whole_seeds(by_training[:2], 2)[1:]).all()
    assert np.isnan(interval_of_whole_seeds(by_training[:0], 4)).all()


def test_pairs_from_unlike_devices_are_counted_and_each_seed_is_shown():
    """On the committed rows; all steps' first seed was trained on a GPU, what it is compared with on a CPU."""
    budget, folder = replace(FULL, side=128, seeds=(0, 1), models=("asca_test",)), Path("benchmarks/results")
    table = recipe_table(budget, ["birds"])
    part = DataTable(table, budget, "birds", Results(folder), (), read_table(folder / "experiments_speed.csv", SPEED))
    csv, row, base = pd.read_csv(folder / "experiments.csv"), *(next(r for r in table.rows if r.name == name) for name in ("all steps", "60 epochs"))
    ours, theirs = (csv[(csv.data == "birds") & (csv.key == r.key("birds", ()))].set_index(["seed", "fold"]).sort_index() for r in (row, base))
    assert part.unlike_pairs(row) == ((ours.device != theirs.device).sum(), 10) and part.unlike_pairs(base) == (0, 0)
    line = next(line for line in part.markdown({}) if line.startswith("| all steps |"))
    assert f"| {ours.top1[0].mean():.3f}, {ours.top1[1].mean():.3f} |" in line


def test_the_recipe_s_default_is_what_src_train_does():
    default = recipe_table(FULL, ["birds"]).rows[0]
    assert default.name == f"the default ({TrainSettings().epochs} epochs)"
    assert flatten(default.settings()) == flatten(TrainSettings()) | {"model": FULL.models[-1], "input_side": FULL.side}
    for row in sizes_table(replace(FULL, epochs=TrainSettings().epochs), ["birds"]).rows:
        assert flatten(row.settings()) == flatten(TrainSettings()) | {"model": row.name, "input_side": FULL.side}


@pytest.mark.parametrize(("words", "message"), [
    ([], "name one or more of table1"),
    (["table1"], "--data names the data sets"),
    (["table1", "--data", "a/x", "b/x"], "by different names"),
    (["table1", "--data", "a/x", "--noise", "y=z"], "--noise y: write NAME=DIR"),
    (["table1", "table2", "--data", "a/x", "--rows", "C-C-C-C", "VGG"], "--rows VGG: no such row; there are ASCA, "),
    (["table1", "--data", "no/where"], "no/where: no train_metadata.csv there; make the folder with python -m src.prepare"),
])
def test_bad_input_is_one_line(words, message, tmp_path, capsys):
    assert experiments.main([*words, "--runs", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache"), "--results", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
