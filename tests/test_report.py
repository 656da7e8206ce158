"""report.md: its links open, its figures equal independent ones, and neither small nor hostile data break it."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.image import imread
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from src import evaluate, metrics, mistakes, plots
from src.cache import Cache
from src.config import AudioConfig
from src.report import text
from src.settings import flatten
from src.train_settings import TrainSettings


def open_report(run) -> str:
    """The report's text, once every picture in it has been opened; it has no other links."""
    report = (run / "report.md").read_text()
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", report)
    assert len(pictures) == len(re.findall(r"(?<!\\)\]\(", report)) >= 3
    for name in pictures:
        assert min(imread(run / name, "png").shape[:2]) > 300
    assert not list(run.glob("*.partial")) and not re.search(r"\bnan\b", report)
    return report


def test_a_trained_fold_s_report(copied, tmp_path, capsys):
    assert evaluate.main(["--run", str(copied), "--resamples", "20"]) == 0
    report = open_report(copied)
    for heading in ("Scores", "What was trained", "Training", "Classes", "Calibration", "Confused pairs", "Worst mistakes"):
        assert f"\n## {heading}\n" in report
    assert "| model | asca_test | asca_nano |" in report and "training.png" in report
    pooled = pd.read_csv(copied / "metrics.csv").query("fold == 'pooled' and metric == 'top1'").iloc[0]
    printed = re.search(r"^\| top-1 \|.* ([\d.]+) \(([\d.]+) to ([\d.]+)\) \|$", report, re.M).groups()
    assert [float(number) for number in printed] == pytest.approx([pooled.value, pooled.low, pooled.high], abs=0.00051)
    assert evaluate.main(["--run", str(copied), "--cache", str(tmp_path / "nowhere")]) == 1
    assert "nowhere holds no cache" in capsys.readouterr().err


def made_run(root, oof: dict[str, tuple[str, list[float]]], classes: list[str], cache) -> None:
    """A run of one finished fold: filename -> (primary label, probabilities). Its metadata hold nothing else."""
    fold = root / "run/fold0"
    fold.mkdir(parents=True)
    pd.DataFrame([{"primary_label": label, "secondary_labels": "[]", "author": "", "filename": name} for name, (label, _) in oof.items()]).to_csv(
        root / "train_metadata.csv", index=False)
    pd.DataFrame(columns=["row_id", *classes]).to_csv(root / "sample_submission.csv", index=False)
    pd.DataFrame([[name, *p] for name, (_, p) in oof.items()], columns=["filename", *classes]).to_csv(fold / "oof.csv", index=False)
    settings = flatten(replace(TrainSettings(), data=(root,), cache=cache, run=root / "run", fold=("0",)))
    (fold / "config.yaml").write_text(yaml.safe_dump({"settings": settings, "audio": AudioConfig().to_dict(), "classes": classes, "versions": {}}))
    (fold / "weights.safetensors").write_bytes(b"")


def test_hostile_names_stay_text_and_an_absent_cache_is_said(tmp_path):
    classes = ["=cmd|'/c calc'!A0", "+a_$x^$_", "<b>|**c**", "-d", "never"]
    made_run(tmp_path, {"@x|y`z.ogg": (classes[0], [0.1, 0.8, 0.3, 0.2, 0.1]), "[a](b).ogg": (classes[1], [0, 0.1, 0.7, 0, 0.2]),
                        "c$_$.ogg": (classes[2], [0, 0.1, 0.7, 0, 0]), "-$\\frac{.ogg": (classes[3], [0.9, 0, 0, 0, 0])}, classes, tmp_path / "gone")
    (tmp_path / "run/mistakes.png").write_text("an earlier evaluation's")
    assert evaluate.main(["--run", str(tmp_path / "run"), "--resamples", "5"]) == 0
    report = open_report(tmp_path / "run")
    assert "No spectrograms: " in report and "gone holds no cache" in report and not (tmp_path / "run/mistakes.png").exists()
    assert "Without a held-out recording, hence not scored: never" in report and "No fold has a history.csv" in report
    for line in report.splitlines():
        cells = re.split(r"(?<!\\)\|", line)[1:-1] if line.startswith("|") else []
        assert len(cells) in (0, 2, 3, 4, 5, 7) and not any(re.match(r"\s*\\?[=+@]|\s*\\?-[^-0-9]", cell) for cell in cells), line
    assert r"'@x\|y\`z.ogg" in report and "<b>" not in report.replace(r"\<b\>", "")
    assert "'-d" in pd.read_csv(tmp_path / "run/per_class.csv").primary_label.tolist()


def test_names_from_the_data_are_no_formulas_in_any_picture(tmp_path):
    name, log_mel, config, estimate = "a$\\frac{$", np.random.default_rng(0).normal(size=(128, 500)), AudioConfig(), (0.5, 0.4, 0.6)
    pictures = {
        "timeline": lambda path: plots.timeline(path, log_mel, np.full((2, 1), 0.5), [name], config, row_seconds=5.0, heading=name),
        "grid": lambda path: plots.spectrogram_grid(path, [log_mel], [name], config, name),
        "lines": lambda path: plots.lines(path, [(name, {name: [(1.0, *estimate)]})], "x", "heading"),
        "intervals": lambda path: plots.intervals(path, [(name, [(name, estimate, [0.5])])], "heading", reference=name, foot="foot")}
    for picture, draw in pictures.items():
        draw(tmp_path / f"{picture}.png")
        assert imread(tmp_path / f"{picture}.png").std() > 0.01, picture


def test_one_recording_of_one_class(tmp_path, cached):
    name = Cache(cached).names[0]
    made_run(tmp_path, {name: ("a", [0.4])}, ["a"], cached)
    assert evaluate.main(["--run", str(tmp_path / "run"), "--resamples", "5"]) == 0
    assert "None: the likeliest class of every recording" in open_report(tmp_path / "run")


def test_mistakes_are_drawn_from_the_cache_the_run_names(tmp_path, cached):
    cache = Cache(cached)
    names = cache.names[:3]  # the first is shorter than a window
    made_run(tmp_path, {names[0]: ("a", [0.1, 0.9, 0]), names[1]: ("b", [0.1, 0.6, 0]), names[2]: ("b", [0.1, 0.2, 0.7])}, ["a", "b", "c"], cached)
    assert evaluate.main(["--run", str(tmp_path / "run"), "--resamples", "5"]) == 0
    report = open_report(tmp_path / "run")
    assert "mistakes.png" in report and report.index(f"| {names[0]} | 0 | a | 0.1 | b | 0.9 |") < report.index(f"| {names[2]} | 0 | b | 0.2 | c | 0.7 |")
    for name in (names[0], max(cache.names, key=cache.n_frames)):
        log_mel, start = mistakes.loudest_window(cache, name)
        whole = cache.read(name).T * cache.config.db_step + cache.config.db_min
        first, n = round(start * 100), log_mel.shape[1]
        np.testing.assert_array_equal(log_mel, whole[:, first : first + n])
        assert n == min(500, whole.shape[1])
        assert log_mel.mean() >= max(whole[:, s : s + n].mean() for s in range(whole.shape[1] - n + 1)) - 1e-9


def test_confusions_and_calibration_equal_scikit_learn_s(rng):
    primary = rng.integers(6, size=200)
    truth, probability = np.eye(6)[primary], rng.random((200, 6))
    taken = mistakes.taken_for(truth, probability, primary)
    matrix = mistakes.confusion(primary, taken, 6)
    np.testing.assert_array_equal(matrix, confusion_matrix(primary, probability.argmax(axis=1), labels=range(6)))
    pairs = mistakes.confused_pairs(matrix, list("abcdef"))
    assert pairs.recordings.sum() == (taken != primary).sum() and pairs.recordings.is_monotonic_decreasing
    assert (pairs.share == pairs.recordings / pairs.held_out).all() and (pairs.primary_label != pairs.taken_for).all()
    assert set(mistakes.shown_classes(matrix, 3)) <= set(range(6)) and len(mistakes.shown_classes(matrix, 3)) == 3
    secondary = truth.copy()
    secondary[:, 0] = 1  # class a is in every recording: to hear it first is no mistake
    assert not (mistakes.taken_for(secondary, probability, primary)[probability.argmax(axis=1) == 0] != primary[probability.argmax(axis=1) == 0]).any()
    curve = metrics.reliability(truth.ravel(), probability.ravel() ** 2)
    share, mean = calibration_curve(truth.ravel(), probability.ravel() ** 2, n_bins=10)
    np.testing.assert_allclose((curve.share, curve.mean), (share, mean))
    assert curve.error == pytest.approx(np.average(np.abs(share - mean), weights=curve.count))
    perfect = metrics.reliability((rng.random(100_000) < 0.3).astype(float), np.full(100_000, 0.3))
    assert perfect.error < 0.01 and perfect.count.sum() == 100_000


@pytest.mark.parametrize(("value", "written"), [("=1", "'=1"), (-1, "-1"), ("a_b", "a_b"), ("_a_", r"\_a\_"), ("a|b\nc", r"a\|b c"), (None, "–"), ([], "–")])
def test_cells(value, written):
    assert text(value) == written
