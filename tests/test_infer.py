import json
import os
import shutil
import subprocess
import sys

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import soundfile

from src import audio, cache, devices, export, infer, onnx_models, plots, submission, timeline, train
from src.config import AudioConfig
from src.metadata import read_csv
from src.predict import predict
from src.soundscapes import decode, find_soundscapes
from src.storage import owned_file
from tests.conftest import make_soundscape, waveform


def score(run, soundscapes, out, *flags) -> pd.DataFrame:
    assert infer.main(["--run", str(run), "--soundscapes", str(soundscapes), "--out", str(out), "--threads", "1", *flags]) == 0
    return pd.read_csv(out, index_col="row_id")


def test_rows_come_from_the_files_and_columns_from_the_model(tmp_path, run, soundscapes, capsys):
    table = score(run, soundscapes, tmp_path / "s.csv")
    assert table.index.tolist() == ["a_1_5", "a_1_10", "b_5"] + [f"c_{5 * k}" for k in range(1, 7)]
    assert table.columns.tolist() == ["demcuc1", "demdov1", "demowl1"] and not (tmp_path / "s_failures.csv").exists()
    assert infer.main(["--check", str(tmp_path / "s.csv"), "--soundscapes", str(soundscapes)]) == 0 and "valid" in capsys.readouterr().out


def test_probabilities_are_the_network_s_on_the_file_s_own_log_mel(tmp_path, run, soundscapes):
    import torch

    model, config = export.load_model(run / "fold0")
    log_mel = audio.log_mel(audio.read_waveform(soundscapes / "c.ogg", 32_000), model_audio := AudioConfig.from_dict(config["audio"]))
    windows = np.stack([np.pad(log_mel[:, 500 * k : 500 * k + 500], ((0, 0), (0, max(0, 500 * k + 500 - log_mel.shape[1]))),
                               constant_values=model_audio.db_min) for k in range(6)])[:, None]
    with torch.no_grad():
        expected = model(torch.from_numpy(windows)).sigmoid().numpy()
    shutil.copytree(run / "fold0", tmp_path / "one/fold0")
    table = score(tmp_path / "one", soundscapes, tmp_path / "s.csv")
    np.testing.assert_allclose(table.loc[[f"c_{5 * k}" for k in range(1, 7)], config["classes"]], expected, atol=1e-5)


def test_a_short_recording_scores_as_it_does_out_of_fold(tmp_path, run):
    """src.train's own scoring, from the cache (log-mels in steps of half a decibel), beside src.infer's."""
    make_soundscape(tmp_path / "data/train_audio/demdov1/b.ogg", 3.0)
    make_soundscape(tmp_path / "data/train_audio/demdov1/c.ogg", 13.0)
    (tmp_path / "data/train_metadata.csv").write_text("primary_label,secondary_labels,author,rating,filename\n"
                                                     "demdov1,[],a,4.0,demdov1/b.ogg\ndemdov1,[],a,4.0,demdov1/c.ogg\n")
    assert cache.main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "cache")]) == 0
    model, config = export.load_model(run / "fold0")
    names = ["demdov1/b.ogg", "demdov1/c.ogg"]
    expected = predict(model, names, cache.Cache(tmp_path / "cache"), devices.start(device="cpu", precision="auto", accumulate=1, threads=1), batch_size=4)
    shutil.copytree(run / "fold0", tmp_path / "one/fold0")
    table = score(tmp_path / "one", tmp_path / "data/train_audio/demdov1", tmp_path / "s.csv")[config["classes"]]
    np.testing.assert_allclose([table.loc["b_5"], table.loc[[f"c_{5 * k}" for k in (1, 2, 3)]].mean()], expected, atol=0.01)


@pytest.mark.parametrize("flags", [("--threads", "2"), ("--batch-size", "1"), ("--batch-size", "48")])
def test_threads_and_batches_do_not_matter(tmp_path, run, soundscapes, flags):
    one, other = score(run, soundscapes, tmp_path / "a.csv"), score(run, soundscapes, tmp_path / "b.csv", *flags)
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_runs_of_different_recipes_are_averaged(tmp_path, data, run, soundscapes, train_flags):
    assert cache.main(["--data", str(data), "--out", str(tmp_path / "c"), "--n-mels", "64", "--n-fft", "2048", "--window-seconds", "4"]) == 0
    other = tmp_path / "other"
    assert train.main([*train_flags, "--cache", str(tmp_path / "c"), "--run", str(other), "--epochs", "1"]) == 0
    both = tmp_path / "both.csv"
    first, second = score(run, soundscapes, tmp_path / "a.csv"), score(other, soundscapes, tmp_path / "b.csv")
    assert infer.main(["--run", str(run), str(other), "--soundscapes", str(soundscapes), "--out", str(both), "--threads", "1"]) == 0
    n_first, n_second = (len(list(folder.glob("fold*/model.onnx"))) for folder in (run, other))
    expected = (n_first * first + n_second * second) / (n_first + n_second)
    np.testing.assert_allclose(pd.read_csv(both, index_col="row_id"), expected, atol=1e-6)


def test_overlapping_windows_keep_the_rows(tmp_path, run, soundscapes):
    one, overlapped = score(run, soundscapes, tmp_path / "a.csv"), score(run, soundscapes, tmp_path / "b.csv", "--hop-seconds", "2.5")
    highest = score(run, soundscapes, tmp_path / "c.csv", "--hop-seconds", "2.5", "--pooling", "max")
    assert one.index.equals(overlapped.index) and np.abs(one - overlapped).to_numpy().max() > 1e-5
    assert (highest >= np.maximum(one, overlapped) - 1e-6).to_numpy().all() and (highest > overlapped + 1e-5).to_numpy().any()


def test_damaged_soundscapes_get_the_prior_and_leave_the_others_alone(tmp_path, run, soundscapes, capsys):
    good = score(run, soundscapes, tmp_path / "good.csv")
    folder = tmp_path / "mixed"
    shutil.copytree(soundscapes, folder)
    make_soundscape(folder / "cut.ogg", 30.0)
    whole = (folder / "cut.ogg").read_bytes()
    (folder / "cut.ogg").write_bytes(whole[: len(whole) // 2])
    for name, content in {"empty.ogg": b"", "text.wav": b"hello", "page.ogg": b"<html>" * 100, "head.ogg": whole[:60]}.items():
        (folder / name).write_bytes(content)
    soundfile.write(folder / "stereo.wav", np.stack([waveform(8, 44_100)] * 2, axis=1), 44_100)
    soundfile.write(folder / "really_wav.ogg", waveform(8), 32_000, format="WAV")
    table = score(run, folder, tmp_path / "s.csv", "--expected-seconds", "20")
    pd.testing.assert_frame_equal(table.loc[good.index], good, check_exact=True)
    failures = read_csv(tmp_path / "s_failures.csv").set_index("filename")
    assert set(failures.index) == {"cut.ogg", "empty.ogg", "text.wav", "page.ogg", "head.ogg"} and (failures.cause != "").all()
    session = onnxruntime.InferenceSession(run / "fold0/model.onnx")
    prior = json.loads(session.get_modelmeta().custom_metadata_map["prior"])
    assert (table.index.str.startswith("empty_")).sum() == 4
    np.testing.assert_allclose(table.loc["empty_5"].to_numpy(), prior, atol=1e-6)
    assert "5 damaged soundscape(s)" in capsys.readouterr().out


def test_a_link_that_leads_nowhere_is_a_damaged_soundscape(tmp_path, run, soundscapes):
    shutil.copytree(soundscapes, tmp_path / "in")
    (tmp_path / "in/gone.ogg").symlink_to(tmp_path / "unplugged/gone.ogg")
    table = score(run, tmp_path / "in", tmp_path / "s.csv", "--expected-seconds", "10")
    assert table.index[table.index.str.startswith("gone")].tolist() == ["gone_5", "gone_10"]
    assert read_csv(tmp_path / "s_failures.csv").cause.tolist() == ["no readable header: missing file"]


def test_what_the_scorer_says_of_a_soundscape_stands_when_the_decoder_ends_later(soundscapes):
    found = find_soundscapes(soundscapes, 600.0)[-1:]
    batches = decode(found, lambda s: {AudioConfig(): submission.window_starts(s.n_rows, 5.0, 5.0)}, 1)
    next(batches)
    found[0].fault = "the time was up"
    assert len(list(batches)) > 1 and found[0].fault == "the time was up"


def test_a_window_without_a_finite_number_costs_its_own_row_alone_and_is_listed(tmp_path, run, soundscapes, monkeypatch):
    expected, probabilities = score(run, soundscapes, tmp_path / "a.csv"), onnx_models.OnnxModel.probabilities

    def spoiled(*rest):
        found = probabilities(*rest)
        found[1:2] = np.nan
        return found

    monkeypatch.setattr(onnx_models.OnnxModel, "probabilities", spoiled)
    table = score(run, soundscapes, tmp_path / "b.csv")
    lost = ["a_1_10", "c_10"]
    pd.testing.assert_frame_equal(table.drop(lost), expected.drop(lost), check_exact=True)
    assert np.ptp(table.loc[lost].to_numpy(), axis=0).max() == 0 and (table.loc[lost] != expected.loc[lost]).any(axis=None), "the prior"
    failures = read_csv(tmp_path / "b_failures.csv")
    assert failures.filename.tolist() == ["a_1.ogg", "c.ogg"] and set(failures.cause) == {"the model gave no finite number"}
    rows = submission.rows_from_windows(np.array([[0.2], [np.inf], [0.4]]), np.array([0.0, 2.5, 5.0]), 5.0, 2)
    np.testing.assert_allclose(rows, [[0.2], [0.4]], rtol=1e-6)


def test_empty_and_missing_folders(tmp_path, run, capsys):
    (tmp_path / "empty").mkdir()
    assert infer.main(["--run", str(run), "--soundscapes", str(tmp_path / "empty"), "--out", str(tmp_path / "s.csv")]) == 0
    assert (tmp_path / "s.csv").read_text() == "row_id,demcuc1,demdov1,demowl1\n"
    assert infer.main(["--run", str(run), "--soundscapes", str(tmp_path / "none"), "--out", str(tmp_path / "s.csv")]) == 1
    assert "no folder" in capsys.readouterr().err


def test_the_sample_s_columns_are_honoured_and_a_mismatch_stops(tmp_path, run, soundscapes, capsys):
    sample = tmp_path / "sample.csv"
    sample.write_text("row_id,demowl1,demcuc1,demdov1\n")
    one, permuted = score(run, soundscapes, tmp_path / "a.csv"), score(run, soundscapes, tmp_path / "b.csv", "--sample", str(sample))
    assert permuted.columns.tolist() == ["demowl1", "demcuc1", "demdov1"]
    pd.testing.assert_frame_equal(permuted[one.columns], one)
    sample.write_text("row_id,demowl1,demcuc1,other\n")
    assert infer.main(["--run", str(run), "--soundscapes", str(soundscapes), "--sample", str(sample), "--out", str(tmp_path / "c.csv")]) == 1
    assert "only in the sample ['other']" in capsys.readouterr().err and not (tmp_path / "c.csv").exists()
    assert infer.main(["--run", str(run), "--soundscapes", str(soundscapes), "--sample", str(tmp_path / "typo.csv"), "--out", str(tmp_path / "c.csv")]) == 1
    assert "typo.csv is not readable" in capsys.readouterr().err


def test_an_interruption_leaves_a_whole_submission(tmp_path, run, soundscapes, monkeypatch, capsys):
    finished, scoring = score(run, soundscapes, tmp_path / "a.csv"), infer.score

    def one_and_no_more(*rest, **options):
        results = scoring(*rest, **options)
        yield next(results)
        raise KeyboardInterrupt

    monkeypatch.setattr(infer, "score", one_and_no_more)
    monkeypatch.setattr(submission.SubmissionFile, "write_if_due", submission.SubmissionFile.write)
    assert infer.main(["--run", str(run), "--soundscapes", str(soundscapes), "--out", str(tmp_path / "b.csv"), "--threads", "1"]) == 130
    assert "a submission holds the rows that were last written, and is begun anew" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv"]
    assert infer.main(["--check", str(tmp_path / "b.csv"), "--soundscapes", str(soundscapes)]) == 0
    table = pd.read_csv(tmp_path / "b.csv", index_col="row_id")
    pd.testing.assert_frame_equal(table[:2], finished[:2], check_exact=True)
    assert np.ptp(table[2:].to_numpy(), axis=0).max() == 0, "the prior"


def test_the_output_s_place_is_known_to_work_before_scoring(tmp_path, run, soundscapes, capsys, monkeypatch):
    flags = ["--run", str(run), "--soundscapes", str(soundscapes), "--threads", "1", "--format", "submission,csv"]
    with monkeypatch.context() as patch:
        patch.setattr(infer, "score", lambda *rest, **options: pytest.fail("scored for nothing"))
        with owned_file(tmp_path / "taken.csv"):
            assert infer.main([*flags, "--out", str(tmp_path / "taken.csv")]) == 1
        assert f"{tmp_path / 'taken.csv'} is in use by another process" in capsys.readouterr().err
        assert infer.main([*flags, "--out", str(tmp_path)]) == 1 and f"--out {tmp_path} is a folder" in capsys.readouterr().err
        assert infer.main([*flags, "--out", str(tmp_path / "x"), "--tables", str(tmp_path / "x")]) == 1 and "cannot write" in capsys.readouterr().err
    assert infer.main([*flags, "--out", str(tmp_path / "result")]) == 0
    assert (tmp_path / "result").is_file() and (tmp_path / "result_tables/all_detections.csv").exists()
    assert infer.main([*flags, "--out", str(tmp_path / "s.csv")]) == 0 and (tmp_path / "s/all_detections.csv").exists()


def test_threads_are_those_that_the_process_may_use(tmp_path, run, soundscapes, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    assert infer.main(["--run", str(run), "--soundscapes", str(soundscapes), "--out", str(tmp_path / "s.csv")]) == 0
    assert "on 1 CPU thread(s)" in capsys.readouterr().out


@pytest.mark.parametrize("flags", ["--time-limit inf", "--time-limit nan", "--time-limit -1", "--started nan", "--threads -1", "--expected-seconds inf"])
def test_numbers_that_mean_nothing_are_refused(flags, capsys):
    assert infer.main(flags.split()) == 1
    assert flags.split()[0] in capsys.readouterr().err.splitlines()[0]


def test_inference_imports_no_training_library():
    code = ("import sys, src.infer, src.submission, src.timeline\n"
            "bad = {'torch', 'timm', 'torchvision', 'sklearn', 'albumentations', 'audiomentations', 'tyro'} & set(sys.modules)\nassert not bad, bad")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("text", "message"), [
    ("id,a\nx_5,0.1\n", "first column"), ("row_id,a\nx_5,1.000000\n", "outside"), ("row_id,a\nx_5,nan\n", "outside"), ("row_id,a\nx_5,\n", "outside"),
    ("row_id,a\nx_5,-0.1\n", "outside"), ("row_id,a\nx_5,0.1\nx_5,0.2\n", "twice"), ("row_id,a\nx,0.1\n", "is not <file stem>"),
    ("row_id,b\nx_5,0.1\n", "columns differ"), ("row_id,a\nx_5,0.1,\n", "more cells than its header")])
def test_the_validator_finds_what_kaggle_would_not_take(tmp_path, text, message):
    (tmp_path / "s.csv").write_text(text)
    assert any(message in fault for fault in submission.check(tmp_path / "s.csv", classes=["a"]))


def test_the_validator_reads_a_doubled_column_and_counts_over_a_long_file(tmp_path):
    (tmp_path / "s.csv").write_text("row_id,a,a\nx_5,0.1,0.2\n")
    assert submission.check(tmp_path / "s.csv") == ["1 column(s) stand there twice, a for one"]
    rows = [f"x_{5 * k},0.1,{'2' if k in (1500, 2200) else '0.2'},{'' if k == 2400 else '0.3'}\n" for k in range(1, 2500)]
    (tmp_path / "s.csv").write_text("row_id,a,b,c\n" + "".join(rows))
    assert submission.check(tmp_path / "s.csv", ids=submission.row_ids("x", 2499)) == [
        "2 value(s) of b outside [0, 1): '2' in row x_7500", "1 value(s) of c outside [0, 1): '' in row x_12000"]
    (tmp_path / "s.csv").write_text("row_id,a\n")
    assert submission.check(tmp_path / "s.csv", classes=["a"], ids=[]) == []
    (tmp_path / "s.csv").write_bytes(b"row_id,a\nx_5,\xff\n")
    assert "s.csv is not readable: " in submission.check(tmp_path / "s.csv")[0]


def test_written_probabilities_stay_under_one(tmp_path):
    file = submission.SubmissionFile(tmp_path / "s.csv", [("x", 2)], ["a", "b"], np.zeros(2))
    with pytest.raises(submission.UserError, match="not finite"):
        file.fill(0, np.array([[np.nan, 0.5], [0.1, 0.0]]))
    assert not (tmp_path / "s.csv").exists()
    file.fill(0, np.array([[1.0, 0.5], [1e-12, 0.0]], np.float32))
    assert file.write_and_check() == []
    assert submission.check(tmp_path / "s.csv", classes=["a", "b"], ids=["x_5", "x_10"]) == []


def test_what_lies_beside_a_linked_folder_is_found(tmp_path, soundscapes):
    (tmp_path / "input").mkdir()
    (tmp_path / "input/test_soundscapes").symlink_to(soundscapes)
    sample = tmp_path / "input/sample_submission.csv"
    sample.write_text("row_id,b,a\n")
    model = onnx_models.OnnxModel(sample, None, AudioConfig(), ("a", "b"), np.zeros(2))
    assert infer.choose_columns([model], None, tmp_path / "input/test_soundscapes") == ("b", "a")
    sample.unlink()
    assert infer.choose_columns([model], None, tmp_path / "input/test_soundscapes") == ("a", "b")


def test_timelines_are_drawn(tmp_path, run, soundscapes, monkeypatch, capsys):
    truths, draw = {}, plots.timeline
    monkeypatch.setattr(plots, "timeline", lambda path, *rest, **more: truths.update({path.stem: more["truth"]}) or draw(path, *rest, **more))
    score(run, soundscapes, tmp_path / "s.csv")
    (tmp_path / "l.csv").write_text("row_id,labels\nc_10,demdov1\n")
    flags = ["--submission", str(tmp_path / "s.csv"), "--soundscapes", str(soundscapes), "--labels", str(tmp_path / "l.csv"), "--out", str(tmp_path / "p")]
    assert timeline.main(flags) == 0
    assert {p.name for p in (tmp_path / "p").iterdir()} == {"a_1.png", "b.png", "c.png"}
    assert {name: np.argwhere(truth).tolist() for name, truth in truths.items()} == {"a_1": [], "b": [], "c": [[1, 1]]}
    (tmp_path / "l.csv").write_text("row_id,labels\nelsewhere_10,demdov1\n")
    assert timeline.main(flags) == 1 and "no row_id in common (elsewhere_10, for one)" in capsys.readouterr().err
    (tmp_path / "l.csv").write_text("row_id,labels\nc_10,demdov1\n")
    whole = (tmp_path / "s.csv").read_text()
    for text, fault in (("file,label\na,b\n", "is no submission"), (whole.replace("0.", "x.", 1), "could not convert"),
                        (whole + whole.splitlines()[-1] + "\n", "1 row_ids stand there twice, c_30 for one"), (whole.replace("0.", "inf,0.", 1), "more cells")):
        (tmp_path / "t.csv").write_text(text)
        assert timeline.main(["--submission", str(tmp_path / "t.csv"), *flags[2:]]) == 1 and fault in capsys.readouterr().err
