import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from benchmarks.models import unreached
from src.config import AudioConfig
from src.console import UserError
from src.export import assert_parity, write_onnx
from src.models import MODELS, ModelSettings, create_model
from src.models.asca import ASCA, VARIANTS, AscaSettings, DropPath, RelativeAttention, RelativeBias, RelativeMlp
from src.models.log_mel_input import LogMelInput
from src.models.torchvision_guard import import_timm
from src.network_cost import count_gmacs, cpu_windows_per_second, settle

AUDIO = AudioConfig()


def log_mel(batch: int) -> torch.Tensor:
    return torch.randn(batch, 1, 128, 500, generator=torch.Generator().manual_seed(0)) * 20 - 50


# one without drop_path, one with a fixed input side, one under a former name
@pytest.mark.parametrize("name", [*MODELS, "timm:ghostnet_050", "timm:test_vit", "timm:mnasnet_a1"])
def test_forward_is_finite_and_every_parameter_gets_a_gradient(name):
    model = create_model(name, 7, AUDIO, ModelSettings(input_side=64, drop_path=0.0))
    logits = model(log_mel(2))
    assert logits.shape == (2, 7) and torch.isfinite(logits).all()
    assert not unreached(model, log_mel(2))


@pytest.mark.parametrize(("name", "side", "n_classes", "published"), [
    ("panns_cnn14", 64, 527, 80_753_615), ("panns_cnn10", 64, 527, 5_219_279), ("ast", 224, 527, 86.6e6), ("mast", 224, 527, 0.58 * 87e6),
    ("psla", 224, 527, 13.6e6), ("efficientnet_b0", 224, 1000, 5.3e6), ("mast_tiny", 224, 1000, 24e6)])
def test_rivals_have_their_papers_sizes(name, side, n_classes, published):
    with torch.device("meta"):
        model = create_model(name, n_classes, AUDIO, ModelSettings(input_side=side))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(published, rel=0 if isinstance(published, int) else 0.02)


def test_psla_s_logit_is_that_of_its_paper_s_probability():
    model = create_model("psla_b0", 3, AUDIO, ModelSettings(input_side=96)).network.eval()
    x = torch.randn(2, 1, 96, 96) * 30
    with torch.no_grad():
        over_time = model.trunk.forward_features(x).mean(2)
        attention, probability = (layer(over_time).double().sigmoid().view(2, 4, 3, 3) for layer in (model.attention, model.probability))
        expected = ((attention / attention.sum(3, keepdim=True)) * probability).sum(3).mean(1)
        np.testing.assert_allclose(model(x).double().sigmoid(), expected, atol=1e-6)
        model.probability.bias += 40  # a certain yes: 1 in float32, and still a logit
        assert (model(x) - 40).abs().max() < 10


@pytest.mark.parametrize("settings", [AscaSettings(**kw) for kw in (
    {}, {"layout": "CCTT"}, {"layout": "CCCC"}, {"attn_norm": "bn"}, {"expand_from": "input"}, {"pool": "max"}, {"activation": "relu"},
    {"activation": "gelu_tanh"}, {"activation": "hard_swish"})],
    ids=["default", "CCTT", "CCCC", "bn", "input", "max", "relu", "gelu_tanh", "hard_swish"])
def test_asca_equals_timm_s_maxxvit_under_the_same_weights(settings):
    import_timm()
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    widths, depths, stem, _ = VARIANTS["test"]
    pool, of_input = settings.pool + "2", settings.expand_from == "input"
    theirs = MaxxVit(MaxxVitCfg(
        embed_dim=widths, depths=depths, block_type=tuple(settings.layout), stem_width=stem,
        conv_cfg=MaxxVitConvCfg(expand_output=not of_input, attn_ratio=1 / 16 if of_input else 0.25, pool_type=pool, act_layer=settings.activation),
        transformer_cfg=MaxxVitTransformerCfg(norm_layer="batchnorm2d" if settings.attn_norm == "bn" else "layernorm2d", pool_type=pool,
                                              act_layer=settings.activation)), img_size=128, in_chans=1, num_classes=5).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1), module.running_var.uniform_(0.5, 2)
    ours = ASCA("test", 5, side=128, settings=settings).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, 1, 128, 128)
    with torch.no_grad():
        np.testing.assert_allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize(("variant", "patch", "millions", "gmacs"), [
    ("test", 32, 0.48, 0.22), ("pico", 32, 10.0, 1.86), ("nano", 32, 14.1, 2.34), ("tiny", 32, 15.6, 2.90), ("0", 32, 22.4, 3.97), ("1", 32, 37.0, 6.79),
    ("nano", 16, 14.1, 3.69), ("tiny", 16, 15.6, 4.28), ("0", 16, 22.4, 5.97)])
def test_sizes_are_coatnet_s(variant, patch, millions, gmacs):
    model = ASCA(variant, 264, side=224, settings=AscaSettings(attn_patch=patch)).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
    widths, depths, _, _ = VARIANTS[variant]
    products = 2 * (224 // patch) ** 4 * widths[3] * depths[3] / 1e9  # q k and their sum over v, which the figures here leave out
    assert count_gmacs(model, torch.zeros(1, 1, 224, 224)) == pytest.approx(gmacs + products, rel=0.03)


@pytest.mark.parametrize(("patch", "tokens"), [(32, 16), (16, 64), (14, 81), (7, 324)])
def test_attn_patch_sets_the_number_of_tokens(patch, tokens):
    model = ASCA("test", 5, side=128, settings=AscaSettings(attn_patch=patch))
    assert model.stages[3].blocks[0].attn.rel_pos.relative_position_index.shape == (tokens, tokens)
    assert model(torch.randn(2, 1, 128, 128)).shape == (2, 5)


def test_relative_bias_depends_on_the_distance_alone():
    bias = RelativeBias(4, 2)()[0].reshape(2, 4, 4, 4, 4)  # heads, row i, column i, row j, column j
    assert torch.equal(bias[:, 1, 1, 2, 3], bias[:, 0, 0, 1, 2]) and not torch.equal(bias[:, 1, 1, 2, 3], bias[:, 2, 3, 1, 1])


def test_relative_positions_equal_timm_s_and_without_them_tokens_have_no_place():
    import_timm()
    from timm.layers import RelPosBias, RelPosMlp

    for ours, theirs in ((RelativeBias(4, 2), RelPosBias((4, 4), 2)), (RelativeMlp(4, 2), RelPosMlp((4, 4), 2, hidden_dim=512).eval())):
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert torch.allclose(ours(), theirs.get_bias(), atol=1e-6)
    x, order = torch.randn(1, 32, 1, 9), torch.randperm(9)
    for rel_pos, placeless in (("none", True), ("mlp", False)):
        attention = RelativeAttention(32, 64, 3, rel_pos)
        moved, still = (attention(y.reshape(1, 32, 3, 3)).reshape(1, 64, 1, 9) for y in (x[..., order], x))
        assert torch.allclose(moved, still[..., order], atol=1e-6) == placeless


def test_unusable_sides_and_names_are_refused():
    network = create_model("asca_test", 5, AUDIO, ModelSettings(input_side=64)).network
    for shape in ((96, 96), (64, 32), (32, 64)):
        with pytest.raises(ValueError, match=f"made for 64 x 64, not {shape[0]} x {shape[1]}"):
            network(torch.zeros(2, 1, *shape))
    for side in (112, -32):
        with pytest.raises(UserError, match=f"multiple of 32, not {side}" if side > 0 else "at least one pixel"):
            create_model("asca_test", 5, AUDIO, ModelSettings(input_side=side))
    for name, message in (("resnet", "choose one of asca_test"), ("timm:resnet19", "timm has no model resnet19; near it"),
                          ("timm:hf-hub:timm/resnet18", "timm has no model")):
        with pytest.raises(UserError, match=message):
            create_model(name, 5, AUDIO)
    for name, side in (("mast", 112), ("panns_cnn14", 31), ("ast", 15)):
        with pytest.raises(UserError, match=f"{name}: needs an input side"):
            create_model(name, 5, AUDIO, ModelSettings(input_side=side))


def test_input_layer_resizes_as_torch_does_and_ignores_gain():
    x = log_mel(3)
    fixed = LogMelInput(AUDIO, 128, "fixed")
    expected = F.interpolate((x + 42) / 17, size=(128, 128), mode="bilinear", antialias=True, align_corners=False)
    np.testing.assert_allclose(fixed(x), expected, atol=1e-4)
    window = LogMelInput(AUDIO, 128, "window")
    np.testing.assert_allclose(window(x), window(x + 13), atol=1e-4)
    assert window(torch.full((1, 1, 128, 500), -100.0)).abs().max() < 1e-6


def test_drop_path_keeps_the_mean_and_is_off_in_eval():
    torch.manual_seed(0)
    drop, x = DropPath(0.3), torch.ones(4000, 1, 1, 1)
    assert drop(x).mean().item() == pytest.approx(1, abs=0.05) and torch.equal(drop.eval()(x), x)


@pytest.mark.parametrize("settings", [
    ModelSettings(), ModelSettings(input_norm="fixed", asca=AscaSettings(attn_patch=16, attn_norm="bn", expand_from="input")),
    ModelSettings(asca=AscaSettings(rel_pos="mlp", attn_patch=7)), ModelSettings(asca=AscaSettings(rel_pos="none", attn_patch=14))],
    ids=["default", "paper", "mlp-7", "none-14"])
def test_onnx_equals_torch_at_any_batch(tmp_path, settings):
    torch.manual_seed(0)
    model = settle(create_model("asca_test", 12, AUDIO, settings), log_mel(8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_onnx(model, log_mel(2), tmp_path / "m.onnx")
    assert_parity(model, tmp_path / "m.onnx", log_mel(8))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "folding the norms works on a copy"
    norms = sum(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "m.onnx").graph.node)
    assert norms == (3 if settings.asca.attn_norm == "bn" else 0), "only a transformer's norms are left: the others are inside convolutions"
    for parameter in model.parameters():
        parameter.data.mul_(1.01)
    with pytest.raises(UserError, match="differs from torch"):
        assert_parity(model, tmp_path / "m.onnx", log_mel(8))


@pytest.mark.parametrize("name", ["panns_cnn10", "ast_tiny", "psla_b0"])  # efficientnet_b0 is psla_b0's trunk; benchmarks.models compares all
def test_rivals_onnx_equals_torch_at_any_batch(tmp_path, name):
    torch.manual_seed(0)
    model = settle(create_model(name, 12, AUDIO, ModelSettings(input_side=64)), log_mel(8))
    write_onnx(model, log_mel(2), tmp_path / "m.onnx")
    assert_parity(model, tmp_path / "m.onnx", log_mel(8))
    with torch.no_grad():
        assert model(log_mel(8)).std(0).max() > 0.01


def test_a_cpu_s_speed_is_measured():
    rate = cpu_windows_per_second(create_model("asca_test", 5, AUDIO, ModelSettings(input_side=64)), AUDIO, threads=1, seconds=0.1)
    assert 5 < rate < 5000
