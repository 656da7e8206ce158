"""Where weights begin, and the noise on them."""

import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file, save_model

from src import train
from src.checkpoint import load_tensors
from src.config import AudioConfig, differences
from src.console import UserError
from src.initialise import initialise, resized
from src.metadata import read_metadata
from src.models import ModelSettings, create_model
from src.models.asca import VARIANTS, AscaSettings
from src.models.torchvision_guard import import_timm
from src.run_config import comparable, read_config
from src.train_settings import TrainSettings
from src.weight_noise import WeightNoise

AUDIO = AudioConfig()
OF_THE_RUN = {"side": 64, "attn_norm": "bn", "activation": "gelu_tanh"}  # src.train's defaults; `begin` has CoAtNet's


def begin(init, model, n_classes=5, *, side=0, fold=0, classes=None, held_out=(), **asca):
    """A fresh model, filled; and what config.yaml keeps of it."""
    settings = TrainSettings(model=model, init=init, network=ModelSettings(input_side=side, asca=AscaSettings(**asca)))
    network = create_model(model, n_classes, AUDIO, settings.network).eval()
    classes = classes or [f"class {number}" for number in range(n_classes)]
    return network, initialise(network, settings, fold=fold, classes=classes, audio=AUDIO, held_out=held_out)


def test_every_stage_of_timm_s_network_maps_and_computes_the_same(tmp_path, capsys):
    import_timm()
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg

    widths, depths, stem, side = VARIANTS["test"]
    theirs = MaxxVit(MaxxVitCfg(embed_dim=widths, depths=depths, block_type=tuple("CCCT"), stem_width=stem), img_size=side, num_classes=1000).eval()
    for name, tensor in theirs.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 2)
    save_file(theirs.state_dict(), tmp_path / "imagenet.safetensors")
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}}, tmp_path / "imagenet.pth")
    x = torch.randn(2, 1, side, side)
    for file in ("imagenet.safetensors", "imagenet.pth"):
        ours, facts = begin(tmp_path / file, "asca_test", 1000)  # as many classes as ImageNet has: the head stays fresh all the same
        said = capsys.readouterr().out
        assert "stem 6/6, stages.0 20/20, stages.1 22/22, stages.2 42/42, stages.3 15/15, norm 2/2" in said
        assert "fresh weights: head.fc.bias, head.fc.weight\n" in said and "not taken from the file: head.fc.bias, head.fc.weight\n" in said
        network = ours.network
        with torch.no_grad():
            np.testing.assert_allclose(network.norm(network.stages(network.stem(x))), theirs.forward_features(x.expand(-1, 3, -1, -1)), atol=1e-5)
        assert not torch.equal(network.head.fc.weight, theirs.head.fc.weight) and len(facts["sha256"]) == 64


def test_of_timm_s_trained_coatnet_all_but_the_attention_of_s3_maps(tmp_path, capsys):
    theirs = import_timm().create_model("coatnet_nano_rw_224")
    save_model(theirs, str(tmp_path / "nano.safetensors"))
    ours, _ = begin(tmp_path / "nano.safetensors", "asca_nano", expand_from="input")
    said = capsys.readouterr().out
    assert "stem 6/6, stages.0 51/60, stages.1 70/82, stages.2 0/122, stages.3 37/41, norm 2/2" in said and "fresh weights: head.fc.bias, " in said
    assert "stages.2.blocks.0, stages.2.blocks.1, " in said.split("fresh weights")[1].split("not taken")[0]  # whole blocks by their names
    assert "stages.2.blocks.0 (" not in said and "stages.2.blocks.3" in said.split("not taken from the file: ")[1]
    state = theirs.state_dict()
    assert torch.equal(ours.network.stages[3].blocks[1].mlp.fc1.weight, state["stages.3.blocks.1.mlp.fc1.weight"])
    assert torch.allclose(ours.network.stem.conv1.weight, state["stem.conv1.weight"].sum(1, keepdim=True))
    larger, _ = begin(tmp_path / "nano.safetensors", "asca_nano", attn_patch=16)  # a table of 27 x 27 distances from one of 13 x 13
    tables = [network.network.stages[3].blocks[1].attn.rel_pos.relative_position_bias_table for network in (ours, larger)]
    assert torch.equal(tables[1], resized(tables[0], tables[1].shape)) and tables[1][27 * 27 // 2].allclose(tables[0][13 * 13 // 2], atol=0.01)


@pytest.mark.parametrize(("theirs", "ours", "trunk"), [
    ("deit_tiny_distilled_patch16_224", "ast_tiny", "vit"), ("mvitv2_tiny", "mast_tiny", ""), ("efficientnet_b0", "psla_b0", "trunk")])
def test_the_rivals_trunks_map(tmp_path, capsys, theirs, ours, trunk):
    given = import_timm().create_model(theirs)
    save_model(given, str(tmp_path / "x.safetensors"))
    network, _ = begin(tmp_path / "x.safetensors", ours)
    fresh = {name.partition(".")[0] for name in capsys.readouterr().out.split("fresh weights: ")[1].splitlines()[0].split(", ")}
    assert fresh == {"ast_tiny": {"head", "norm"}, "mast_tiny": {"head"}, "psla_b0": {"attention", "probability", "head_weight"}}[ours]
    filled = network.network.get_submodule(trunk).state_dict()
    same = [name for name, tensor in given.state_dict().items() if name in filled and torch.equal(filled[name], tensor)]
    assert len(same) > 0.9 * len(filled)
    if ours == "ast_tiny":  # AST's 21 x 21 patches from 14 x 14; class and distillation token stay
        before, after = given.pos_embed, network.network.vit.pos_embed
        assert after.shape == (1, 2 + 21 * 21, 192) and torch.equal(after[:, :2], before[:, :2])
        assert torch.allclose(after[:, 2:].mean(1), before[:, 2:].mean(1), atol=2e-3)


class Executes:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXECUTED"],)


def test_unsafe_damaged_and_foreign_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("EXECUTED", str(tmp_path / "executed"))
    good = create_model("asca_test", 5, AUDIO).state_dict()
    for name in ("pickle.bin", "archive.pth"):
        (torch.save if name.endswith("pth") else lambda x, f: f.write_bytes(pickle.dumps(x, protocol=2)))({"stem.conv1.weight": Executes()}, tmp_path / name)
    for name, write in (("cut.safetensors", save_file), ("cut.pth", torch.save)):
        write(good, tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1000])
    (tmp_path / "text.bin").write_text("no tensors")
    save_file({"network.stem.conv1.weight": torch.full((16, 1, 3, 3), float("nan"))}, tmp_path / "nan.safetensors")
    for name in ("pickle.bin", "archive.pth", "cut.safetensors", "cut.pth", "text.bin", "nan.safetensors"):
        with pytest.raises(UserError, match=f"{name} is damaged"):
            begin(tmp_path / name, "asca_test")
    assert not (tmp_path / "executed").exists()
    save_file({"conv1.weight": torch.ones(64, 3, 7, 7)}, tmp_path / "resnet.safetensors")
    torch.save([torch.ones(3)], tmp_path / "list.pth")
    for name in ("resnet.safetensors", "list.pth"):
        with pytest.raises(UserError, match=f"{name} does not fit asca_test: 0 of"):
            begin(tmp_path / name, "asca_test")
    for place in ("nowhere.pth", "."):
        with pytest.raises(UserError, match="does not exist" if place != "." else "no finished fold"):
            begin(tmp_path / place, "asca_test")


def test_another_run_gives_all_but_the_head_and_never_a_recording_it_was_trained_on(run, data, tmp_path, capsys):
    held_out = pd.read_csv(run / "fold0/oof.csv").filename.tolist()
    weights, _ = load_tensors(run / "fold0/weights.safetensors")
    model, facts = begin(run / "fold0", "asca_test", 7, **OF_THE_RUN, held_out=held_out)
    assert "fresh weights: head." in capsys.readouterr().out and facts["recipe_sha256"]
    for name, tensor in model.state_dict().items():
        assert name.startswith("network.head") or name.endswith("tracked") or torch.equal(tensor, weights[name]), name
    same, _ = begin(run, "asca_test", 3, **OF_THE_RUN, held_out=held_out, classes=read_config(run / "fold0")["classes"])
    assert "fresh" not in capsys.readouterr().out and torch.equal(same.network.head.fc.weight, weights["network.head.fc.weight"])
    usual = TrainSettings().network
    other = TrainSettings(model="asca_test", init=run / "fold0", network=replace(usual, input_side=64, asca=replace(usual.asca, head="attention")))
    pooled = create_model("asca_test", 7, AUDIO, other.network)  # a head of another kind begins fresh
    initialise(pooled, other, fold=0, classes=[f"class {k}" for k in range(7)], audio=AUDIO, held_out=held_out)
    initialise(create_model("asca_test", 3, AUDIO, other.network), other, fold=0, classes=read_config(run / "fold0")["classes"], audio=AUDIO, held_out=held_out)
    assert torch.equal(pooled.state_dict()["network.norm.weight"], weights["network.norm.weight"])
    heard = read_metadata([data]).table.filename.tolist()
    for place in (run / "fold0", run / "fold0/weights.safetensors"):
        with pytest.raises(UserError, match=f"trained on {len(heard) - len(held_out)} of the recordings held out here"):
            begin(place, "asca_test", 7, **OF_THE_RUN, held_out=heard)
    folds = pd.read_csv(data / "folds.csv").assign(fold=lambda table: table.fold.where(table.filename.isin(held_out), -2))
    folds.to_csv(tmp_path / "left_out.csv", index=False)  # as if only these had been in training
    aside = shutil.copytree(run / "fold0", tmp_path / "aside")  # under another name
    config = read_config(aside)
    config["settings"]["folds"] = str(tmp_path / "left_out.csv")
    (aside / "config.yaml").write_text(yaml.safe_dump(config))
    begin(aside, "asca_test", 7, **OF_THE_RUN, held_out=heard)  # what was left out was not heard
    later = tmp_path / "later/fold0"  # trained on other recordings, and begun from the run that knows these
    shutil.copytree(run / "fold0", later)
    (tmp_path / "train_metadata.csv").write_text("primary_label,secondary_labels,author,filename\nx,[],,x/1.ogg\n")
    config = read_config(later)
    config["settings"] |= {"data": [str(tmp_path)], "init": str(run / "fold0")}
    (later / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"{run / 'fold0'} was trained on"):
        begin(later, "asca_test", 7, **OF_THE_RUN, held_out=heard)
    other = TrainSettings(model="asca_test", init=run / "fold0", network=replace(usual, input_side=64, input_norm="fixed"))
    with pytest.raises(UserError, match="another network.*input_norm: window -> fixed"):
        initialise(create_model("asca_test", 7, AUDIO, other.network), other, fold=0, classes=[f"class {k}" for k in range(7)], audio=AUDIO, held_out=held_out)
    begin(run / "fold0", "asca_test", 7, **OF_THE_RUN, held_out=held_out)
    assert "other log-mels" not in capsys.readouterr().out
    config = read_config(run / "fold0")
    config["audio"]["fmax"] = 12000.0
    config["settings"]["init"] = str(run)
    (aside / "config.yaml").write_text(yaml.safe_dump(config))
    begin(aside, "asca_test", 7, **OF_THE_RUN, held_out=held_out)
    assert "was trained on other log-mels (fmax: 12000" in capsys.readouterr().out
    for name, asca, message in (("efficientnet_b0", {}, "model: asca_test -> efficientnet_b0"), ("asca_test", {"layout": "CCTT"}, "layout: CCCT -> CCTT")):
        with pytest.raises(UserError, match=f"another network.*{message}"):
            begin(run / "fold0", name, 7, side=64, **asca)


def test_a_run_is_continued_with_the_file_it_began_from_alone(tmp_path, run, train_flags, capsys):
    flags = [*train_flags, "--run", str(tmp_path / "run"), "--epochs", "1"]
    weights = load_file(run / "fold0/weights.safetensors")
    for number in (0, 1):
        save_file({name: tensor + number for name, tensor in weights.items()}, tmp_path / f"{number}.safetensors")
    assert train.main([*flags, "--init", str(tmp_path / "0.safetensors")]) == 0
    assert "the weights begin from" in capsys.readouterr().out
    for other in (["--init", str(tmp_path / "1.safetensors")], []):
        assert train.main([*flags, *other]) == 1 and "other settings (init" in capsys.readouterr().err
    (tmp_path / "0.safetensors").rename(tmp_path / "moved.safetensors")
    assert train.main([*flags, "--init", str(tmp_path / "moved.safetensors")]) == 0 and "nothing to do" in capsys.readouterr().out
    of = [read_config(tmp_path / "run/fold0") | {"init": {"sha256": sha256, "recipe_sha256": recipe}} for sha256, recipe in
          (("a", None), ("b", None), ("a", "r"), ("b", "r"), ("b", "s"))]
    for (first, second), differ in {(0, 1): True, (2, 3): False, (3, 4): True, (0, 2): True}.items():
        assert bool(differences(*(comparable(of[number], between_folds=True) for number in (first, second)))) == differ
        assert differences(comparable(of[first]), comparable(of[second]))


def test_weight_noise_is_on_for_a_step_and_leaves_no_trace():
    torch.manual_seed(0)
    model = create_model("asca_test", 5, AUDIO)
    before, state = {name: p.clone() for name, p in model.named_parameters()}, torch.get_rng_state()
    WeightNoise(model, 0).add()
    assert torch.equal(torch.get_rng_state(), state) and all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    noise = WeightNoise(model, 0.1)
    noise.add()
    noisy = {name: p.clone() for name, p in model.named_parameters()}
    for name, p in noisy.items():
        if p.ndim < 2:
            assert torch.equal(p, before[name]), name
        elif p.numel() > 1000:
            assert ((p - before[name]).norm() / before[name].norm()).item() == pytest.approx(0.1, rel=0.1), name
    noise.add()  # another part of the same batch
    assert all(torch.equal(p, noisy[name]) for name, p in model.named_parameters())
    noise.remove()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weights_trained_under_noise_at_a_rate_of_zero_are_the_clean_ones(tmp_path, train_flags):
    flags = [*train_flags, "--epochs", "1", "--learning-rate", "0", "--batch-size", "6", "--accumulate", "2"]
    kept, losses = [], []
    for share in ("0", "0.3"):
        run = tmp_path / share
        assert train.main([*flags, "--run", str(run), "--weight-noise", share, "--ema-decay", "0.9"]) == 0
        kept.append(load_tensors(run / "fold0/weights.safetensors")[0])
        losses.append(pd.read_csv(run / "fold0/history.csv").train_loss[0])
    torch.manual_seed(0)
    fresh = create_model("asca_test", 3, AUDIO, ModelSettings(input_side=64))
    for name, parameter in fresh.named_parameters():
        assert torch.equal(kept[0][name], parameter) and torch.equal(kept[1][name], parameter), name
    assert losses[0] != losses[1]
