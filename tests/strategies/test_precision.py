"""Other layouts and fewer bits: channels-last images, autocast, dynamic int8 quantisation of the
linear layers.
"""

import copy
import functools

import pytest
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn
from torch.ao.quantization import quantize_dynamic

import tdm_lightning as tdm
from tdm_lightning.export import export_onnx, export_program
from tdm_lightning.ops.linear import is_quantized
from tests.vit.test_dense import STRATEGIES, reduced, wide

pytestmark = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
ALL = {
    **STRATEGIES,
    "svite-tdm": lambda: [tdm.SViTE(), tdm.TDM(0.5, (1, 2), tdm.TokenMerger(features="keys"))],
}
ADAPTIVE = {"avit", "spvit", "iared2", "mpm"}


def made(name):
    return reduced(name) if name in STRATEGIES else tdm.attach(wide(), ALL[name]()).eval()


@pytest.fixture
def images():
    torch.manual_seed(4)
    return torch.randn(3, 3, 32, 48)


def seeded(model, images):
    torch.manual_seed(6)  # for the strategy that draws
    return model.trace(images)


def same_decisions(one, other):
    """The share of patches that both passes treat alike, over all reducing layers."""
    pairs = list(zip(one.layers, other.layers, strict=True))
    return (
        torch.stack([(a.role == b.role).float().mean() for a, b in pairs]).mean().item()
        if pairs
        else 1.0
    )


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_channels_last(images, name):
    model = made(name)
    logits, trace = seeded(model, images)
    for each in (model, model.to(memory_format=torch.channels_last)):
        found, again = seeded(each, images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
        assert same_decisions(again, trace) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_autocast_at_inference(images, name, dtype):
    model = made(name)
    _, trace = seeded(model, images)
    with torch.autocast("cpu", dtype):
        found, again = seeded(model, images)
    assert found.isfinite().all()
    if name not in ADAPTIVE:
        assert again.token_counts == trace.token_counts
    if dtype is torch.float16:
        assert same_decisions(again, trace) > 0.9


def packed(model):
    """By torch, which makes them layers of another class."""
    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def subclassed(model):
    """By torchao, which makes the weights tensors of another class; it needs a newer torch than the
    oldest that does here.
    """
    torchao = pytest.importorskip("torchao.quantization")
    model, config = copy.deepcopy(model), torchao.Int8DynamicActivationInt8WeightConfig()
    torchao.quantize_(model, config, filter_fn=lambda layer, _: wide_enough(layer))
    return model


def wide_enough(layer):
    """Whether it is a linear layer with more than one input and output, which torchao asks for."""
    return min(getattr(layer, "in_features", 0), getattr(layer, "out_features", 0)) > 1


@pytest.mark.parametrize("quantise", [packed, subclassed])
@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_dynamic_int8(images, name, quantise):
    model = made(name)
    logits, trace = seeded(model, images)
    small = quantise(model)
    assert all(is_quantized(layer) for layer in small.modules() if wide_enough(layer))
    found, again = seeded(small, images)
    assert found.isfinite().all()
    assert same_decisions(again, trace) > 0.6  # random weights: many near ties
    if name not in ADAPTIVE:
        assert again.token_counts == trace.token_counts
    assert torch.equal(seeded(model, images)[0], logits)  # the model itself is as it was


@pytest.mark.parametrize("quantise", [packed, subclassed])
@torch.no_grad()
def test_int8_decides_by_its_own_attention(images, quantise):
    """Importance is the class row of the attention that the quantised model computes; with weights
    that eight bits hold exactly only the activations are rounded.
    """
    model = reduced("tdm")
    for layer in model.vit.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_((layer.weight * 64).round().clamp(-127, 127) / 64)
            layer.weight[0, 0] = 127 / 64  # sets the scale
    small, projected = quantise(model), []
    attn = small.vit.blocks[1].attn
    attn.qkv.register_forward_hook(lambda layer, inputs, out: projected.append(out))
    a, b = (seeded(each, images)[1].layers[0].importance for each in (model, small))
    q, k, _ = projected[0].unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    own = (q[:, :, :1] @ k.transpose(-2, -1) * attn.scale).softmax(-1).mean((1, 2))
    torch.testing.assert_close(b, own[:, model.num_prefix_tokens :], atol=1e-6, rtol=1e-4)
    assert (a - b).abs().max() < 0.03
    assert torch.nn.functional.cosine_similarity(a, b, dim=1).min() > 0.98


SHAPE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}
FAMILIES = {
    "parallel": lambda: wide(img_size=32, block_fn=ParallelScalingBlock),
    "no class token": lambda: wide(img_size=32, class_token=False, qk_norm=True),
    "eva, separate projections": lambda: Eva(**SHAPE, use_rot_pos_emb=True, qkv_fused=False),
    "beit": lambda: Beit(**SHAPE, use_rel_pos_bias=True),
    "relpos": lambda: VisionTransformerRelPos(**SHAPE),
}


@pytest.mark.parametrize("quantise", [packed, subclassed])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_dynamic_int8_of_every_kind_of_attention(name, quantise):
    torch.manual_seed(1)
    images = torch.randn(2, 3, 32, 32)
    model = tdm.attach(FAMILIES[name]().eval(), tdm.TDM(0.5, (1,)))
    logits, trace = model.trace(images)
    found, again = quantise(model).trace(images)
    assert found.isfinite().all()
    assert again.token_counts == trace.token_counts
    assert same_decisions(again, trace) > 0.6
    cosine = functools.partial(torch.nn.functional.cosine_similarity, dim=1)
    assert cosine(logits, found).min() > 0.5


@pytest.mark.parametrize(
    ("use", "purpose", "quantise"),
    [
        (tdm.flops.count_macs, "count the multiply-accumulates", packed),
        (tdm.flops.count_macs, "count the multiply-accumulates", subclassed),
        (functools.partial(export_program, path="model.pt2"), "export", packed),
        (functools.partial(export_onnx, path="model.onnx"), "export", packed),
        (functools.partial(export_onnx, path="model.onnx"), "export", subclassed),
    ],
)
def test_quantised_weights_can_only_be_run(tmp_path, monkeypatch, use, purpose, quantise):
    monkeypatch.chdir(tmp_path)
    small = quantise(reduced("tdm"))
    with pytest.raises(ValueError, match=f"cannot {purpose}: 'vit.blocks.0.attn.qkv' is quantised"):
        use(small)
    assert not list(tmp_path.iterdir())


def test_torchaos_int8_goes_into_a_program_of_torch(tmp_path):
    path = tmp_path / "model.pt2"
    model = tdm.attach(wide(depth=2), tdm.EViT(0.5, (1,))).eval()
    assert export_program(subclassed(model), path).agreement.difference < 1e-4
    weight = torch.export.load(path).state_dict["vit.blocks.0.attn.qkv.weight"]
    assert "int8" in type(weight).__name__.lower()


@pytest.mark.parametrize("quantise", [packed, subclassed])
def test_an_attention_that_cannot_be_quantised_is_refused(quantise):
    """Where timm's own module cannot run either."""
    model = tdm.attach(Eva(**SHAPE, use_rot_pos_emb=True).eval(), tdm.TDM(0.5, (1,)))
    small = quantise(model)
    with pytest.raises(
        TypeError,
        match="EvaAttention multiplies by the weight of its qkv layer, which a quantised layer",
    ):
        small(torch.zeros(1, 3, 32, 32))
    for block in small.vit.blocks:
        block.attn.qkv_bias_separate = True
    assert small.trace(torch.zeros(1, 3, 32, 32))[1].token_counts == [16, 8, 8]
