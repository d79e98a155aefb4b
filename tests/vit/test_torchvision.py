"""torchvision's ViTs: as they are where nothing is reduced, as timm's of the same weights where
something is.
"""

import pytest
import timm
import torch
from torch import nn
from torchvision.models import vit_b_16
from torchvision.models.vision_transformer import Encoder, VisionTransformer

import tdm_lightning as tdm
from tests.helpers.exporting import check_compiled, check_exported

SHAPE = {"image_size": 32, "patch_size": 4, "num_layers": 4, "num_heads": 2, "hidden_dim": 32}
STRATEGIES = {
    "ward": lambda: tdm.WardTDM(0.7, (0, 2)),
    "tdm": lambda: tdm.TDM(0.7, (1, 2)),
    "evit": lambda: tdm.EViT(0.7, (1, 2)),
    "tome": lambda: tdm.ToMe(8),
    "mctf": lambda: tdm.MCTF(8),
    "pitome": lambda: tdm.PiToMe(0.8),
    "random": lambda: tdm.Random(0.5, (1,)),
    "dpcknn": lambda: tdm.DPCKNN(0.6, (1, 2)),
}
#: torchvision's names in timm's words.
NAMES = {
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.",
    "encoder.ln": "norm",
    "heads.head": "head",
    "ln_": "norm",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}


def make(cls=VisionTransformer, **changes):
    torch.manual_seed(0)
    vit = cls(**{**SHAPE, "mlp_dim": 64, "num_classes": 5, **changes}).eval()
    for weight in vit.parameters():
        nn.init.normal_(weight, std=0.3)
    return vit


def in_timm(vit):
    """timm's model of the same weights."""
    twin = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=4, num_heads=2, embed_dim=32,
        mlp_ratio=2, num_classes=5,
    )  # fmt: skip
    weights = {}
    for name, value in vit.state_dict().items():
        for mine, theirs in NAMES.items():
            name = name.replace(mine, theirs)
        weights[name] = value
    twin.load_state_dict(weights)
    return twin.eval()


@pytest.fixture(scope="module")
def vit():
    return make()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_without_reduction_nothing_changes(vit, images):
    for strategy in (tdm.Strategy(), tdm.TDM(1.0, (1,))):
        model = tdm.attach(vit, strategy)
        torch.testing.assert_close(model(images), vit(images), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.run(images).logits, vit(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_it_decides_as_timm_does(vit, images, name):
    torch.manual_seed(3)
    logits, trace = tdm.attach(vit, STRATEGIES[name]()).eval().trace(images)
    torch.manual_seed(3)
    expected, other = tdm.attach(in_timm(vit), STRATEGIES[name]()).eval().trace(images)
    assert trace.token_counts == other.token_counts
    assert trace.token_counts[-1] < 64
    for mine, theirs in zip(trace.layers, other.layers, strict=True):
        assert torch.equal(mine.assignment, theirs.assignment)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tdm.attach(vit, STRATEGIES["ward"]())(images).shape, logits.shape)


@torch.no_grad()
def test_it_compiles_and_exports(vit, images):
    check_compiled(tdm.attach(vit, tdm.WardTDM(0.7, (1,))), images)
    check_exported(tdm.attach(vit, tdm.TDM(0.7, (1,))), images)


@pytest.mark.parametrize("name", ["ward", "tdm"])
def test_it_trains_in_half_precision(images, name):
    vit = make(dropout=0.1, attention_dropout=0.1).train()
    model = tdm.attach(vit, STRATEGIES[name]()).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).float().square().sum()
    loss.backward()
    assert all(weight.grad.isfinite().all() for weight in vit.parameters())
    assert vit.encoder.layers[3].self_attention.in_proj_weight.grad.abs().sum() > 0


def test_a_policy_in_training(images):
    model = tdm.attach(make(), tdm.DyViT(0.7, (1, 2))).train()
    model(images).sum().backward()
    assert all(weight.grad is not None for weight in model.strategy.parameters())


@torch.no_grad()
def test_the_last_block_computes_what_the_head_reads(vit, images):
    model, seen = tdm.attach(vit, tdm.TDM(0.7, (1, 2))).eval(), []
    expected = model.run(images).logits
    assert model.reads_class_tokens
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    with vit.encoder.ln.register_forward_hook(lambda *given: seen.append(given[2].shape)):
        assert not model.reads_class_tokens
        model(images)
    assert seen == [(2, 33, 32)]
    found, plain = (tdm.flops.mac_report(one) for one in (model, tdm.attach(vit, tdm.Strategy())))
    assert found.forward < found.total < plain.total


def test_gradients_are_checkpointed(images):
    found = []
    for enable in (False, True):
        model = tdm.attach(make(), tdm.TDM(0.7, (1,))).train()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        found.append(model.vit.conv_proj.weight.grad)
    torch.testing.assert_close(*found)


def test_in_a_larger_model_and_back(vit, images):
    whole = nn.Sequential(vit, nn.Softmax(dim=1))
    reduced = tdm.attach(whole, tdm.ToMe(8))
    assert reduced is whole
    assert reduced[0].vit is vit
    assert tdm.detach(whole)[0] is vit


@torch.no_grad()
def test_heads(images):
    vit = make(representation_size=16)
    model = tdm.attach(vit, tdm.TDM(0.7, (1,)))
    features = model.run(images)
    assert model.forward_head(features.features, pre_logits=True).shape == (2, 16)
    vit.heads = nn.Identity()
    bare = tdm.attach(vit, tdm.TDM(0.7, (1,)))
    assert bare(images).shape == (2, 32)
    assert bare.num_classes == 0
    assert bare.forward_intermediates(images, intermediates_only=True)[1].shape == (2, 32, 8, 8)


def test_their_own_models():
    with torch.device("meta"):
        model = tdm.attach(vit_b_16(), tdm.WardTDM(0.7))
    assert model._info.patches == 196
    assert model._info.depth == 12


class OtherForward(VisionTransformer):
    def forward(self, x):
        return super().forward(x) + 1


class OtherPatches(VisionTransformer):
    def _process_input(self, x):
        return super()._process_input(x).flip(1)


class OtherEncoder(Encoder):
    pass


def test_what_runs_in_another_way_is_refused(vit):
    with pytest.raises(tdm.errors.UnsupportedModelError, match="its own forward"):
        tdm.attach(make(OtherForward), tdm.TDM())
    with pytest.raises(tdm.errors.UnsupportedModelError, match="patches in its own way"):
        tdm.attach(make(OtherPatches), tdm.TDM())
    encoded = make()
    encoded.encoder.__class__ = OtherEncoder
    with pytest.raises(tdm.errors.UnsupportedModelError, match="encodes its patches"):
        tdm.attach(encoded, tdm.TDM())
    keyed = make()
    keyed.encoder.layers[1].self_attention.add_zero_attn = True
    with pytest.raises(tdm.errors.UnsupportedModelError, match="keys of its own"):
        tdm.attach(keyed, tdm.TDM())
    with pytest.raises(TypeError, match="needs blocks with timm's"):
        tdm.attach(vit, tdm.SViTE())
    with pytest.raises(ValueError, match="B×3×32×32 for this model"):
        tdm.attach(vit, tdm.TDM(0.7, (1,)))(torch.randn(1, 3, 48, 48))
