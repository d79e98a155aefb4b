"""Foreign ViT classes by one adapter: what registering refuses, and the laws for the example's."""

import importlib
from pathlib import Path

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import tdm_lightning as tdm
from tdm_lightning.vit.adapters import registry

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    """The example's module, which registers its adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module("vit_of_your_own")


@pytest.fixture
def vit(example):
    torch.manual_seed(0)
    model = example.EncoderViT(32, 4, 6, 32, 2, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


STRATEGIES = {
    "tdm": lambda rate: tdm.TDM(rate, (1, 3)),
    "evit": lambda rate: tdm.EViT(rate, (1, 3)),
    "tome": lambda rate: tdm.ToMe(0 if rate == 1 else 9),
    "topk": lambda rate: tdm.TopK(rate, (1, 3)),
    "dpcknn": lambda rate: tdm.DPCKNN(rate, (1, 3)),
    "dyvit": lambda rate: tdm.DyViT(rate, (1, 3)),
    "stacked": lambda rate: [tdm.Strategy(), tdm.TDM(rate, (1, 3))],
}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)


@every_strategy
@torch.no_grad()
def test_keep_rate_1_is_the_plain_model(vit, images, name):
    torch.testing.assert_close(tdm.attach(vit, STRATEGIES[name](1.0))(images), vit(images))


@every_strategy
@torch.no_grad()
def test_tokens_fall_and_every_patch_is_accounted_for(vit, images, name):
    model = tdm.attach(vit, STRATEGIES[name](0.5))
    logits, trace = model.trace(images)
    assert logits.isfinite().all()
    assert trace.token_counts[-1] < 64
    for layer in trace.layers:
        count = trace.token_counts[layer.index]
        for image in range(3):
            assert set(layer.assignment[image].tolist()) - {-1} == set(range(count))
    assert torch.equal(model(images), logits)
    for index in range(3):
        torch.testing.assert_close(model(images[index : index + 1])[0], logits[index])
    assert torch.equal(tdm.detach(model)(images), vit(images))


@torch.no_grad()
def test_importance_is_the_attention_that_torch_computes(vit, images):
    trace = tdm.attach(vit, tdm.EViT(0.5, (0,))).trace(images)[1]
    x = vit.layers[0].norm1(vit.embed(images))
    _, weights = vit.layers[0].self_attn(x, x, x, need_weights=True)
    torch.testing.assert_close(trace.layers[0].importance, weights[:, 0, 1:], atol=1e-6, rtol=1e-4)


def test_training_costs_monitors_and_dense_features(vit, images):
    model = tdm.attach(vit, tdm.TDM(0.5, (1, 3)))
    model.train()(images).square().sum().backward()
    assert vit.patches.weight.grad.abs().sum() > 0
    assert tdm.flops.count_macs(model) < tdm.flops.count_macs(vit)
    solved = tdm.solve_keep_rate(vit, tdm.TDM(layers=(1, 3)), 0.7 * tdm.flops.count_macs(vit) / 1e9)
    assert 0 < solved < 1
    recorder = tdm.metrics.DiversityRecorder(model)
    with recorder:
        model.eval()(images)
    assert len(recorder.compute()) == 6
    (dense,) = model.forward_intermediates(images, 1, intermediates_only=True)
    assert dense.shape == (3, 32, 8, 8)


@torch.no_grad()
def test_a_program_of_torch_export(vit, images):
    model = tdm.attach(vit, tdm.TDM(0.5, (1, 3)))
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


def test_what_its_blocks_cannot_do_is_refused(vit, images):
    with pytest.raises(TypeError, match="with PSViT: its blocks compute all rows"):
        tdm.attach(vit, tdm.PSViT())
    with pytest.raises(TypeError, match="policy"):
        tdm.attach(vit, tdm.DyViT(0.5, (1, 3))).train()(images)
    with pytest.raises(ValueError, match="images must be"):
        tdm.attach(vit, tdm.TDM(0.5, (1, 3)))(torch.zeros(1, 3, 40, 40))


def test_registering_twice_or_nonsense_is_refused(example):
    adapter = example.EncoderAdapter
    with pytest.raises(ValueError, match="has an adapter already, EncoderAdapter"):
        tdm.register_adapter(example.EncoderViT, adapter)
    for wrong in ("VisionTransformer", 3, nn.Linear(1, 1), int):
        with pytest.raises(TypeError, match="takes a model class first"):
            tdm.register_adapter(wrong, adapter)
    for wrong in (nn.Linear, object(), "adapter"):
        with pytest.raises(TypeError, match="adapter must be an Adapter"):
            tdm.register_adapter(nn.Sequential, wrong)

    class Half(tdm.Adapter):
        def info(self, vit):
            return None

    with pytest.raises(
        TypeError, match="Half cannot take Sequential apart: it lacks attend, blocks"
    ):
        tdm.register_adapter(nn.Sequential, Half)
    assert nn.Sequential not in registry._ADAPTERS


def test_a_subclass_that_runs_in_another_way_is_refused():
    class Twice(VisionTransformer):
        def forward_features(self, x, attn_mask=None):
            return super().forward_features(x) + super().forward_features(x.flip(-1))

    model = Twice(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
    with pytest.raises(TypeError, match=r"Twice has its own forward_features\(\)"):
        tdm.attach(model, tdm.TDM(layers=(1,)))


def test_an_attention_of_another_class_is_refused():
    class Odd(timm.layers.Attention):
        def forward(self, x, attn_mask=None, is_causal=False):
            return super().forward(x.roll(1, 1), attn_mask)

    model = timm.create_model("test_vit", img_size=64)
    model.blocks[2].attn.__class__ = Odd
    with pytest.raises(TypeError, match="its attention is Odd"):
        tdm.attach(model, tdm.TDM(layers=(1,)))


def test_a_way_of_pooling_that_nobody_knows_is_refused():
    model = timm.create_model("test_vit", img_size=64)
    model.global_pool = "median"
    with pytest.raises(TypeError, match="pools by 'median'"):
        tdm.attach(model, tdm.TDM(layers=(1,)))
