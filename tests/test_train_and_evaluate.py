import ast
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.metrics import average_precision_score

from benchmarks.kill_training import SAME
from src import cache, evaluate, fold_training, train
from src.checkpoint import load_tensors, save_tensors
from src.config import AudioConfig
from src.console import UserError
from src.dataset import to_log_mel
from src.evaluate import score_submission
from src.export import load_model
from src.folds import read_folds
from src.optimiser import learning_rate_at
from src.run_config import read_config, versions
from src.settings import flatten, parse
from src.train_settings import TrainSettings


def test_a_fold_leaves_all_its_files(run, fold_table):
    folder = run / "fold0"
    assert {"config.yaml", "weights.safetensors", "history.csv", "curves.png", "first_batch.png", "oof.csv", "model.onnx"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.glob("*.partial")) and not (folder / "checkpoint.safetensors").exists()
    oof = pd.read_csv(folder / "oof.csv")
    assert set(oof.filename) == {name for name, fold in read_folds(fold_table).items() if fold == 0}
    assert oof.iloc[:, 1:].to_numpy().min() >= 0 and oof.iloc[:, 1:].to_numpy().max() <= 1
    assert len(pd.read_csv(folder / "history.csv")) == 3


@pytest.mark.parametrize("seconds", ["0", "1000"])
def test_killed_and_run_again_equals_the_uninterrupted_run(tmp_path, run, train_flags, seconds):
    flags = [*train_flags, "--run", str(tmp_path / "run"), "--workers", "1", "--checkpoint-seconds", seconds]
    folder, kills, continued = tmp_path / "run/fold0", 0, ""
    for _ in range(8):  # killed in the middle of the second and of the third epoch
        process = subprocess.Popen([sys.executable, "-m", "src.train", *flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in process.stdout:
            continued += line * ("continuing after epoch" in line)
            if f"epoch   {kills + 1}:" in line and kills < 2:
                time.sleep(0.05)
                process.kill()
                kills += 1
                break
        process.wait()
        if process.returncode == 0:
            break
        assert not (folder / "weights.safetensors").exists()
    assert kills == 2 and process.returncode == 0
    assert ("after epoch 1" in continued) == ("after epoch 2" in continued) == (seconds == "0")
    for name in SAME:
        assert (folder / name).read_bytes() == (run / "fold0" / name).read_bytes(), name


def test_finished_folds_are_skipped_and_changed_settings_refused(run, train_flags, fold_table, capsys):
    flags = [*train_flags, "--run", str(run)]
    before = (run / "fold0/weights.safetensors").stat().st_mtime_ns
    assert train.main(flags) == 0 and "nothing to do" in capsys.readouterr().out
    assert train.main([*flags, "--mixup-alpha", "1"]) == 1
    assert "settings.mixup_alpha: 0.4 -> 1.0" in capsys.readouterr().err
    assert (run / "fold0/weights.safetensors").stat().st_mtime_ns == before
    assert train.main([*flags, "--fold", "9"]) == 1 and "holds the folds 0, 1, 2" in capsys.readouterr().err
    assert train.main([flag for flag in flags if flag != "--noise" and not flag.endswith("/noise")]) == 1
    assert "settings.noise: some -> none" in capsys.readouterr().err
    other = fold_table.with_name("other.csv")  # what is held out now was trained on
    table = pd.read_csv(fold_table)
    table.assign(fold=(table.fold + 1) % 3).to_csv(other, index=False)
    assert train.main([*flags, "--folds", str(other)]) == 1 and "recordings.held_out_digest" in capsys.readouterr().err
    whole = sorted(path.name for path in (run / "fold0").iterdir())
    assert train.main([*flags, "--restart", "--noise", str(run / "fold0")]) == 1 and "no readable audio files below it" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "fold0").iterdir()) == whole, "nothing is deleted ahead of a mistake"
    for wrong in (["--crop-choices", "0"], ["--gain-db", "-6.0"], ["--mel-shift-bins", "-1"], ["--threads", "-1"], ["--min-snr-db", "25.0"],
                  ["--drop-path", "1.0"], ["--drop-path", "-0.5"], ["--frequency-masks", "-1"], ["--time-mask-frames", "-5"], ["--min-snr-db", "nan"],
                  ["--roll-probability", "50.0"], ["--gaussian-probability", "-0.5"], ["--sampling-power", "nan"], ["--mixup-alpha", "-1.0"]):
        assert train.main([*flags, *wrong]) == 1 and f"{wrong[0]} {float(wrong[1]):g}" in capsys.readouterr().err.replace(".0:", ":")
    for wrong in (["--learning-rate", "-1.0"], ["--label-smoothing", "1"], ["--warmup-epochs", "-1"], ["--train-share", "1.5"], ["--epochs", "0"],
                  ["--seed", str(2**63)]):
        assert train.main([*flags, *wrong]) == 1 and f"{wrong[0]} {wrong[1]}" in capsys.readouterr().err


def test_one_process_a_fold_ctrl_c_ends_it_and_restart_begins_anew(tmp_path, train_flags, capsys):
    flags = [*train_flags, "--run", str(tmp_path), "--epochs", "1000"]
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background is deaf to Ctrl-C, and so are its children
    process = subprocess.Popen([sys.executable, "-m", "src.train", *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    for line in process.stdout:
        if "epoch   1:" in line:
            break
    assert train.main(flags) == 1 and "is in use by another process" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and "the same command continues" in process.stderr.read()
    assert (tmp_path / "fold0/checkpoint.safetensors").exists()
    assert train.main([*flags, "--epochs", "1"]) == 1 and "settings.epochs: 1000 -> 1" in capsys.readouterr().err
    assert train.main([*flags, "--epochs", "1", "--restart"]) == 0
    assert len(pd.read_csv(tmp_path / "fold0/history.csv")) == 1 and not (tmp_path / "fold0/checkpoint.safetensors").exists()


def test_a_fold_that_leaves_nothing_to_train_on_is_refused(tmp_path, train_flags, fold_table, capsys):
    pd.read_csv(fold_table).assign(fold=0).to_csv(tmp_path / "folds.csv", index=False)
    assert train.main([*train_flags, "--folds", str(tmp_path / "folds.csv"), "--run", str(tmp_path / "run")]) == 1
    assert "leaves no cached, labelled recording to train fold 0 on" in capsys.readouterr().err


def test_settings_that_nothing_reads_are_named(tmp_path, capsys):
    flags = ["--model", "efficientnet_b0", "--layout", "CCTT", "--noise", str(tmp_path), "--waveform-probability", "0"]
    train.say_unused(parse(TrainSettings, flags, prog="x", description=""))
    said = capsys.readouterr().out
    assert "--layout: not used" in said and f"--noise {tmp_path} is not used" in said
    train.say_unused(parse(TrainSettings, [*flags[2:6], "--model", "asca_test"], prog="x", description=""))
    assert not capsys.readouterr().out
    train.say_unused(parse(TrainSettings, ["--model", "panns_cnn10", "--drop-path", "0.2"], prog="x", description=""))
    assert "--drop-path 0.2 is not used" in capsys.readouterr().out


def test_a_loss_that_is_no_number_names_step_and_files(tmp_path, train_flags, capsys):
    assert train.main([*train_flags, "--run", str(tmp_path), "--learning-rate", "1e30", "--clip-gradient", "0", "--warmup-epochs", "0"]) == 1
    error = capsys.readouterr().err
    assert "the loss is nan" in error and "step" in error and ".ogg" in error and "Traceback" not in error
    assert not (tmp_path / "fold0/weights.safetensors").exists()
    one_step = ["--epochs", "1", "--batch-size", "12"]  # its only loss is that of the weights before the step
    assert train.main([*train_flags, *one_step, "--run", str(tmp_path / "x"), "--learning-rate", "1e30", "--clip-gradient", "0", "--warmup-epochs", "0"]) == 1
    assert "the weights are no finite numbers after epoch 1" in capsys.readouterr().err
    assert not list((tmp_path / "x/fold0").glob("*.safetensors"))


def test_the_history_s_last_row_is_what_scikit_learn_says_of_the_kept_weights(tmp_path, run, data, train_flags, monkeypatch):
    secondary, highest = pd.read_csv(data / "train_metadata.csv").set_index("filename").secondary_labels.map(ast.literal_eval), []
    loss = fold_training.multi_label_loss
    monkeypatch.setattr(fold_training, "multi_label_loss", lambda logits, target, *rest: highest.append(float(target.max())) or loss(logits, target, *rest))
    soft = ["--secondary-labels", "soft", "--label-smoothing", "0.25", "--epochs", "1", "--run", str(tmp_path / "soft")]
    assert train.main([*train_flags, *soft]) == 0 and set(highest) == {0.75}
    for folder, share in ((run / "fold0", 0.0), (tmp_path / "soft/fold0", 0.5)):
        names, last = pd.read_csv(folder / "oof.csv").filename, pd.read_csv(folder / "history.csv").iloc[-1]
        model, config = load_model(folder)
        windows, _ = load_tensors(folder / "golden_windows.safetensors")  # the first of each held-out recording
        with torch.inference_mode():
            probability = model(to_log_mel(windows["windows"], AudioConfig.from_dict(config["audio"]))).sigmoid().numpy()
        target = np.array([[float(label == name.split("/")[0]) or share * (label in secondary[name]) for label in config["classes"]] for name in names])
        assert len(names) == len(target) == 6 and (target == 0.5).any() == (share > 0)
        best = target[np.arange(6), probability.argmax(axis=1)]
        precision = [average_precision_score(target[:, c] > 0, probability[:, c]) for c in range(target.shape[1]) if target[:, c].any()]
        entropy = -(target * np.log(probability) + (1 - target) * np.log(1 - probability)).mean()
        assert (last.valid_top1, last.valid_macro_ap) == pytest.approx(((best > 0).mean(), np.mean(precision)), abs=1e-6)
        assert last.valid_loss == pytest.approx(entropy, abs=1e-4)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_recording_that_became_unreadable_is_named_in_a_line(tmp_path, data, train_flags, workers, capfd):
    shutil.copytree(data / "train_audio", tmp_path / "data/train_audio")
    shutil.copy(data / "train_metadata.csv", tmp_path / "data")
    for path in (tmp_path / "data/train_audio").rglob("*.ogg"):
        path.write_bytes(path.read_bytes()[:200])
    flags = ["--data", str(tmp_path / "data"), "--run", str(tmp_path / "run"), "--waveform-probability", "1", "--workers", workers]
    assert train.main([*train_flags, *flags]) == 1
    error = capfd.readouterr().err
    assert "was readable when it was cached, and is not now" in error and "Traceback" not in error


def test_a_memory_that_is_too_small_is_told_with_the_remedy(tmp_path, train_flags, monkeypatch, capsys):
    def learn(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fold_training.FoldTraining, "learn", learn)
    assert train.main([*train_flags, "--accumulate", "2", "--batch-size", "60", "--run", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert "batches of 12, since there are not 60" in said.out and "does not hold a part of 6 crops; --accumulate 4 halves it" in said.err


def test_copies_whose_audio_is_gone_stop_no_training_from_the_cache(tmp_path, data, train_flags, capsys):
    """A copy under another name is known by its file; the cache never held it."""
    shutil.copytree(data / "train_audio", tmp_path / "main/train_audio")
    shutil.copy(data / "train_metadata.csv", tmp_path / "main")
    table = pd.read_csv(data / "train_metadata.csv").iloc[[3]]
    (tmp_path / "more/train_audio/x").mkdir(parents=True)
    shutil.copy(data / "train_audio" / table.filename.iloc[0], tmp_path / "more/train_audio/x/1.ogg")
    table.assign(filename="x/1.ogg").to_csv(tmp_path / "more/train_metadata.csv", index=False)
    both = ["--data", str(tmp_path / "main"), str(tmp_path / "more")]
    assert cache.main([*both, "--out", str(tmp_path / "cache"), "--workers", "1"]) == 0 and "less 1 copies" in capsys.readouterr().out
    for name in ("main", "more"):
        shutil.rmtree(tmp_path / name / "train_audio")
    flags = [*both, "--cache", str(tmp_path / "cache"), "--run", str(tmp_path / "run"), "--waveform-probability", "0", "--epochs", "1"]
    assert train.main([*train_flags, *flags]) == 0
    assert "1 recordings of further folders, x/1.ogg for one, are neither there nor in the cache" in capsys.readouterr().out


def test_a_run_s_config_runs_it_again(run, train_flags):
    settings = parse(TrainSettings, ["--config", str(run / "fold0/config.yaml")], prog="x", description="")
    assert settings == parse(TrainSettings, [*train_flags, "--run", str(run)], prog="x", description="")


def test_recipes_are_read_flags_beat_them_and_unknown_keys_are_refused(tmp_path):
    for recipe in ("paper", "cpu", "gpu", "demo"):
        parse(TrainSettings, ["--config", f"src/recipes/{recipe}.yaml"], prog="x", description="")
    paper = parse(TrainSettings, ["--config", "src/recipes/paper.yaml", "--epochs", "2"], prog="x", description="")
    assert (paper.batch_size, paper.learning_rate, paper.epochs, paper.network.asca.attn_patch) == (12, 5e-5, 2, 16)
    (tmp_path / "own.yaml").write_text("compile: true\npictures: false\n")
    own = parse(TrainSettings, [f"--config={tmp_path / 'own.yaml'}", "--no-compile", "--pictures"], prog="x", description="")
    assert own == TrainSettings() != parse(TrainSettings, ["--config", str(tmp_path / "own.yaml")], prog="x", description="")
    (tmp_path / "bad.yaml").write_text("epoch: 3\n")
    with pytest.raises(UserError, match="unknown setting.*epoch"):
        parse(TrainSettings, ["--config", str(tmp_path / "bad.yaml")], prog="x", description="")
    assert yaml.safe_load(yaml.safe_dump(flatten(paper)))["attn_norm"] == "bn"


def test_a_config_is_written_without_git_and_a_damaged_one_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions()["commit"] == "unknown"
    for content in (b"", b"\xff", b"settings: [1]\n"):
        (tmp_path / "config.yaml").write_bytes(content)
        with pytest.raises(UserError, match="config.yaml is damaged"):
            read_config(tmp_path)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    settings = TrainSettings(epochs=10, warmup_epochs=2, learning_rate=1.0)
    rates = [learning_rate_at(step, settings, 5) for step in range(50)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10) and max(rates) == 1 and rates[-1] < 0.01
    assert [learning_rate_at(step, TrainSettings(epochs=1, warmup_epochs=5, learning_rate=1.0), 4) for step in range(4)] == pytest.approx([0.5, 1, 1, 0.5])
    assert rates[30] == pytest.approx(0.5) and all(a >= b for a, b in zip(rates[10:], rates[11:]))


def test_checkpoints_refuse_a_changed_bit_and_other_files(tmp_path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"a": torch.arange(100.0)}, {"epoch": 3})
    tensors, facts = load_tensors(path)
    assert torch.equal(tensors["a"], torch.arange(100.0)) and facts == {"epoch": 3}
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="t.safetensors is damaged"):
        load_tensors(path)
    torch.save({"a": torch.ones(1)}, path)  # a pickle
    with pytest.raises(UserError, match="t.safetensors is damaged"):
        load_tensors(path)


def test_evaluate_writes_numbers_and_pictures_and_refuses_mixed_settings(copied, train_flags, capsys):
    assert train.main([*train_flags, "--run", str(copied), "--fold", "1"]) == 0
    assert evaluate.main(["--run", str(copied)]) == 0
    assert {"report.md", "metrics.csv", "per_class.csv", "per_class.png"} <= {p.name for p in copied.iterdir()}
    table = pd.read_csv(copied / "metrics.csv")
    assert {"0", "1", "pooled"} <= set(table.fold.astype(str)) and (table.low <= table.value).all() and (table.value <= table.high).all()
    config = copied / "fold1/config.yaml"
    config.write_text(config.read_text().replace("mixup_alpha: 0.4", "mixup_alpha: 0.9"))
    assert evaluate.main(["--run", str(copied)]) == 1 and "settings.mixup_alpha" in capsys.readouterr().err
    config.write_text(config.read_text().replace("mixup_alpha: 0.9", "mixup_alpha: 0.4"))


def test_a_submission_is_scored_against_its_labels(tmp_path):
    (tmp_path / "s.csv").write_text("row_id,NA,b\nx_5,0.9,0.1\nx_10,0.2,0.3\nx_15,0.1,0.8\n")
    (tmp_path / "l.csv").write_text("row_id,labels\nx_15,b\nx_5,NA;b\nx_10,\n")
    scores = score_submission(tmp_path / "s.csv", tmp_path / "l.csv", resamples=10)
    assert scores["top1"].value == 1 and scores["macro_ap"].value == pytest.approx((1 + (1 + 2 / 3) / 2) / 2)
    (tmp_path / "l.csv").write_text("row_id,labels\nx_15,b\nx_5,NA\nx_5,b\nx_10,\n")  # one species a line
    assert score_submission(tmp_path / "s.csv", tmp_path / "l.csv", resamples=10) == scores
    (tmp_path / "l.csv").write_text("row_id,labels\n")
    with pytest.raises(UserError, match="no labelled row"):
        score_submission(tmp_path / "s.csv", tmp_path / "l.csv")
    (tmp_path / "l.csv").write_text("row_id,labels\nx_20,b\n")
    with pytest.raises(UserError, match="lacks 1 of the labelled rows"):
        score_submission(tmp_path / "s.csv", tmp_path / "l.csv")
