"""Several processes, parts of batches, the moving average, other losses and heads, soft labels."""

import copy
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from src import cache, devices, distil, evaluate, train
from src.augment import random_filter, roll
from src.checkpoint import load_tensors, save_tensors
from src.config import AudioConfig
from src.console import UserError
from src.cuda_graphs import replayed
from src.dataset import BalancedSampler
from src.fold_training import FoldTraining
from src.folds import read_folds
from src.losses import multi_label_loss
from src.metadata import read_metadata
from src.models import ModelSettings, create_model
from src.models.asca import AscaSettings
from src.models.torchvision_guard import import_timm
from src.run_config import read_config
from src.soft_labels import blend, read_soft_labels

from .conftest import make_data

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TORCHRUN = [*LAUNCH, "-m", "src.train", "--"]
# Two processes that differ, or of which one fails while the other waits inside C, as for a GPU: there no handler written in Python runs.
SEVERAL = """
import ctypes, os, sys
from src import devices
from src.console import UserError, stage

@stage
def main(argv):
    accelerator = devices.start(device="cpu", precision="fp32", accumulate=1, threads=1)
    if argv == ["differ"]:
        devices.require_same(accelerator, {"precision": "fp32", "checkpoint.safetensors": os.environ["RANK"]})
    elif accelerator.is_main_process:
        raise UserError("only here")
    else:
        mutex = ctypes.create_string_buffer(64)
        while True:
            ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever, the second time

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def test_two_processes_score_the_same_recordings(tmp_path, run, train_flags):
    done = subprocess.run([*TORCHRUN, *train_flags, "--run", str(tmp_path), "--device", "cpu", "--ema-decay", "0.9"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("epoch   3:") == 1 and "2 x cpu" in done.stdout  # one process speaks
    ours, alone = (pd.read_csv(folder / "fold0/oof.csv") for folder in (tmp_path, run))
    assert ours.filename.tolist() == alone.filename.tolist() and np.isfinite(ours.iloc[:, 1:]).all(axis=None)
    ours, alone = (pd.read_csv(folder / "fold0/history.csv") for folder in (tmp_path, run))
    assert ours.learning_rate.tolist() == alone.learning_rate.tolist()


def test_two_processes_take_the_steps_of_one(tmp_path, train_flags):
    """Without batch norm and mixup, which see halves of a batch: the same weights after three steps, which a wrong gradient moves by 1e-3 each."""
    flags = [*train_flags, "--model", "ast_tiny", "--epochs", "1", "--mixup-probability", "0", "--batch-size", "4", "--ema-decay", "0.9", "--weight-noise", "0"]
    assert train.main([*flags, "--run", str(tmp_path / "one")]) == 0
    done = subprocess.run([*TORCHRUN, *flags, "--run", str(tmp_path / "two"), "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (load_tensors(tmp_path / name / "fold0/weights.safetensors")[0] for name in ("one", "two"))
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-4


@pytest.mark.parametrize(("does", "told"), [("differ", "the processes do not agree on checkpoint.safetensors: "), ("fail", "error: only here")])
def test_several_processes_end_together(tmp_path, does, told):
    """Where they differ they say so; where one fails the other, which waits, need not be killed."""
    (tmp_path / "several.py").write_text(SEVERAL)
    done = subprocess.run([*LAUNCH, "-m", "several", does], capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()})
    assert done.returncode == 1 and told in done.stderr, done.stderr[-3000:]
    assert "forcefully exiting" not in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_processes_and_parts_share_the_same_crops(processes, accumulate):
    whole = BalancedSampler(np.ones(40), 12, seed=1)
    parts = [list(BalancedSampler(np.ones(40), 12, 1, accumulate=accumulate, process=k, processes=processes)) for k in range(processes)]
    for number, batch in enumerate(whole):
        seen = [key for part in parts for keys in part[number * accumulate : (number + 1) * accumulate] for key in keys]
        assert sorted(seen) == sorted(batch)
    assert all(len(keys) == 12 // (processes * accumulate) for part in parts for keys in part)


def test_a_batch_in_parts_is_one_step_and_the_average_is_what_is_kept(tmp_path, train_flags, capsys):
    flags = [*train_flags, "--epochs", "1", "--batch-size", "6", "--accumulate", "3", "--ema-decay", "0.9", "--loss", "focal", "--head", "gem",
             "--roll-probability", "1", "--filter-db", "6", "--crop-choices", "2"]
    assert train.main([*flags, "--run", str(tmp_path)]) == 0
    weights, _ = load_tensors(tmp_path / "fold0/weights.safetensors")
    assert weights["network.head.power"].shape == ()
    assert train.main([*flags, "--ema-decay", "0", "--run", str(tmp_path / "last")]) == 0
    last, _ = load_tensors(tmp_path / "last/fold0/weights.safetensors")
    assert max(float((weights[key] - last[key]).abs().max()) for key in weights if weights[key].is_floating_point()) > 1e-4, "the last weights were kept"
    without_batch_norm = [*flags, "--model", "ast_tiny", "--epochs", "1", "--mixup-probability", "0", "--ema-decay", "0", "--weight-noise", "0"]
    for name, parts in (("whole", "1"), ("parts", "2")):
        assert train.main([*without_batch_norm, "--accumulate", parts, "--run", str(tmp_path / name)]) == 0
    whole, parts = (load_tensors(tmp_path / name / "fold0/weights.safetensors")[0] for name in ("whole", "parts"))
    assert max(float((whole[key] - parts[key]).abs().max()) for key in whole) < 1e-4  # a wrong gradient moves AdamW by its rate, 1e-3
    assert train.main([*train_flags, "--run", str(tmp_path / "x"), "--accumulate", "4"]) == 1 and "multiple of 4" in capsys.readouterr().err
    assert train.main([*train_flags, "--run", str(tmp_path / "x"), "--precision", "fp16"]) == 1 and "needs a GPU" in capsys.readouterr().err


def test_losses_equal_timm_and_torch():
    torch.manual_seed(0)
    logits, target = (torch.randn(5, 7) * 3).requires_grad_(), (torch.rand(5, 7) > 0.7).float()
    import_timm()
    from timm.loss import AsymmetricLossMultiLabel

    ones = torch.ones_like(target)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits)[0]

    ours, timms = multi_label_loss(logits, target, ones, "asymmetric") * 7, AsymmetricLossMultiLabel()(logits, target)
    assert ours.item() == pytest.approx(timms.item(), rel=1e-5) and torch.allclose(gradient(ours), gradient(timms), atol=1e-6)
    sure = torch.full((1, 1), 20.0, requires_grad=True)  # of a species that is not there: the loss has to pull it down
    multi_label_loss(sure, torch.zeros(1, 1), torch.ones(1, 1), "focal").backward()
    assert sure.grad.item() > 0.9
    p = torch.where(target == 1, logits.sigmoid(), 1 - logits.sigmoid())
    ours, lins = multi_label_loss(logits, target, ones, "focal"), (-(1 - p) ** 2 * p.log()).mean()
    assert ours.item() == pytest.approx(lins.item(), rel=1e-4) and torch.allclose(gradient(ours), gradient(lins), atol=1e-6)
    masked = multi_label_loss(logits, target, torch.zeros_like(target).index_fill(1, torch.tensor([2]), 1), "bce")
    assert masked.item() == pytest.approx(torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 2], target[:, 2]).item() / 7, rel=1e-5)


def test_attention_head_weighs_time_steps():
    model = create_model("asca_test", 3, AudioConfig(), ModelSettings(input_side=64, asca=AscaSettings(head="attention")))
    head = model.network.head
    x = torch.randn(2, 128, 4, 5)
    with torch.no_grad():
        head.attention.weight.zero_()
        head.attention.bias.zero_()
        assert torch.allclose(head(x), head.fc(x.mean((2, 3))[:, :, None])[:, :, 0], atol=1e-6)  # equal weights: the mean


def test_roll_keeps_the_frames_and_filters_keep_silence(rng):
    crop = rng.integers(20, 200, (50, 128)).astype(np.uint8)
    crop[:10] = 0
    turned = roll(crop, 1.0, rng)
    assert sorted(map(bytes, turned)) == sorted(map(bytes, crop))
    filtered = random_filter(crop, 7.0, rng)
    difference = filtered.astype(int)[10:] - crop[10:]
    assert (filtered[:10] == 0).all() and 0 < np.abs(difference).max() <= 7
    assert (difference == difference[0]).all()  # one response for all frames


def test_soft_labels_enter_out_of_fold_only(tmp_path, data, copied, train_flags, fold_table, capsys):
    assert train.main([*train_flags, "--run", str(copied), "--fold", "1", "2"]) == 0
    extra = tmp_path / "extra"  # recordings without labels
    make_data(extra, per_species=2)
    table = pd.read_csv(extra / "train_metadata.csv").assign(primary_label="")
    (extra / "train_audio/new").mkdir()
    for number, name in enumerate(table.filename):
        (extra / "train_audio" / name).rename(extra / f"train_audio/new/XC{number}.ogg")
    table["filename"] = [f"new/XC{number}.ogg" for number in range(len(table))]
    table.to_csv(extra / "train_metadata.csv", index=False)
    both = ["--data", str(data), str(extra)]
    assert cache.main([*both, "--out", str(tmp_path / "cache")]) == 0
    soft = tmp_path / "soft.csv"
    assert distil.main(["--run", str(copied), "--data", str(extra), "--cache", str(tmp_path / "cache"), "--out", str(soft)]) == 0
    metadata, folds = read_metadata([data, extra]), read_folds(fold_table)
    found = read_soft_labels(soft, metadata, folds)
    shutil.copytree(copied, tmp_path / "from elsewhere")
    for config in (tmp_path / "from elsewhere").rglob("config.yaml"):
        config.write_text(config.read_text().replace(str(data), "/no/longer"))
    assert distil.main(["--run", str(tmp_path / "from elsewhere"), "--home", str(data), "--data", str(extra), "--cache", str(tmp_path / "cache"),
                        "--out", str(tmp_path / "again.csv")]) == 0 and (tmp_path / "again.csv").read_bytes() == soft.read_bytes()
    pooled = pd.concat(evaluate.out_of_fold(copied, (), None)[0].values()).set_index("filename")
    assert len(found) == len(pooled) + len(table)
    assert np.allclose(found.loc[pooled.index], pooled, atol=1e-5)
    target = np.eye(3, dtype=np.float32)[[0, 1]]
    rows = metadata.table[metadata.table.filename.isin([pooled.index[0], table.filename[0]])].reset_index(drop=True)
    blended, weight = blend(rows, target, np.ones_like(target), found, 0.25)
    assert np.allclose(blended[0], 0.75 * target[0] + 0.25 * found.loc[rows.filename[0]]) and np.allclose(blended[1], found.loc[rows.filename[1]])
    flags = [*train_flags, *both, "--cache", str(tmp_path / "cache"), "--epochs", "1", "--soft-labels", str(soft)]
    assert train.main([*flags, "--run", str(tmp_path / "student")]) == 0
    assert f"{12 + len(table)} recordings in training" in capsys.readouterr().out
    without = [flag for flag in flags if flag not in ("--soft-labels", str(soft))]
    assert train.main([*without, "--run", str(tmp_path / "student")]) == 1 and "soft_labels_sha256" in capsys.readouterr().err
    other = tmp_path / "other"  # a teacher that has heard the further folder already, and is named first
    assert train.main([*[flag for flag in flags if flag not in ("--soft-labels", str(soft))], "--fold", "all", "--run", str(other)]) == 0
    capsys.readouterr()
    assert distil.main(["--run", str(other), str(copied), "--data", str(extra), "--cache", str(tmp_path / "cache"), "--out", str(soft) + "2"]) == 1
    assert "no recording there is new to the teachers" in capsys.readouterr().err
    moved = tmp_path / "moved"  # the same recordings under another year's species code
    shutil.copytree(extra / "train_audio/new", moved / "train_audio/newer")
    table.assign(filename=table.filename.str.replace("new/", "newer/")).to_csv(moved / "train_metadata.csv", index=False)
    assert cache.main(["--data", str(data), str(moved), "--out", str(tmp_path / "cache2")]) == 0
    assert distil.main(["--run", str(other), "--data", str(moved), "--cache", str(tmp_path / "cache2"), "--out", str(soft) + "2"]) == 1
    assert "no recording there is new to the teachers" in capsys.readouterr().err
    leaky = pd.read_csv(soft, dtype=str)
    leaky.loc[0, "source"] = str((int(leaky.source[0]) + 1) % 3)  # a model that was trained on this recording
    leaky.to_csv(soft, index=False)
    with pytest.raises(UserError, match="held them out"):
        read_soft_labels(soft, metadata, folds)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_recorded_passes_equal_launched_ones():
    """Outputs, gradients and weights; recording leaves batch norm's running means where they were."""
    log_mel = torch.randn(4, 1, 128, 500, device="cuda") * 15 - 40
    torch.manual_seed(0)
    launched = create_model("asca_test", 5, AudioConfig(), ModelSettings(input_side=64, drop_path=0.0)).cuda().train()
    recorded = copy.deepcopy(launched)
    assert replayed(recorded, log_mel)
    assert all(torch.equal(a, b) for a, b in zip(launched.state_dict().values(), recorded.state_dict().values()))
    for model in (launched, recorded):
        model(log_mel).square().sum().backward()
    torch.testing.assert_close(launched(log_mel), recorded(log_mel), rtol=1e-3, atol=1e-3)
    for a, b in zip(launched.parameters(), recorded.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-2, atol=1e-3)


def test_fp16_s_scale_begins_anew_with_each_fold_and_may_be_left_behind(tmp_path, run, train_flags, monkeypatch):
    accelerator = SimpleNamespace(free_memory=lambda: None, device=torch.device("cpu"), scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    devices.release(accelerator)
    assert accelerator.scaler.get_scale() == 65536
    flags = [*train_flags, "--run", str(tmp_path), "--validate-every", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(FoldTraining, "finish", lambda training: None)
        assert train.main(flags) == 0
    checkpoint = tmp_path / "fold0/checkpoint.safetensors"
    tensors, facts = load_tensors(checkpoint)
    save_tensors(checkpoint, tensors, facts | {"scaler": torch.amp.GradScaler("cpu").state_dict()})  # as a GPU in fp16 left it
    config = tmp_path / "fold0/config.yaml"
    config.write_text(config.read_text().replace("commit: ", "commit: before "))
    assert train.main(flags) == 0 and (tmp_path / "fold0/weights.safetensors").read_bytes() == (run / "fold0/weights.safetensors").read_bytes()
    now = read_config(tmp_path / "fold0")
    assert [one["versions"]["commit"] for one in now["earlier"]] == ["before " + now["versions"]["commit"]] and now["earlier"][0]["processes"] == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_finished_fold_s_memory_is_free_when_the_next_begins(tmp_path, train_flags, monkeypatch, precision):
    alive, known = [], []
    begin = FoldTraining.__init__

    def counted(training, *rest):
        alive.append(sum(model() is not None for model in known))
        begin(training, *rest)
        known.append(weakref.ref(training.model))

    monkeypatch.setattr(FoldTraining, "__init__", counted)
    flags = [*train_flags, "--run", str(tmp_path), "--epochs", "1", "--precision", precision]
    for _ in range(2):  # the second time all folds are finished
        assert train.main([*flags, "--fold", "0", "1"]) == 0
    assert alive == [0, 0, 0, 0]


def test_noise_that_is_named_like_held_out_recordings_is_told(tmp_path, data, run, train_flags, capsys):
    name = pd.read_csv(run / "fold0/oof.csv").filename[0]
    (tmp_path / "noise").mkdir()
    shutil.copy(data / "noise/wind.ogg", tmp_path / "noise" / Path(name).name)
    assert train.main([*train_flags, "--run", str(tmp_path / "run"), "--epochs", "1", "--noise", str(tmp_path / "noise")]) == 0
    assert f"1 of its files are named like recordings that are held out here, {Path(name).stem} for one" in capsys.readouterr().out
