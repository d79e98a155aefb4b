"""The last block computes what the head reads: equal logits, fewer multiply-accumulates, and all
rows as soon as somebody wants them.
"""

import copy

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import nn

import tdm_lightning as tdm
from tdm_lightning.compare.launches import operations
from tdm_lightning.flops import mac_report
from tests.vit.test_dense import STRATEGIES, wide
from tests.vit.test_families import MODELS, SMALL, made

#: More of timm's blocks and heads, beside the families of another test.
OTHERS = {
    "distilled": lambda: timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=8, depth=4, num_classes=10
    ),
    "registers": lambda: VisionTransformer(**SMALL, reg_tokens=4, qk_norm=True, init_values=0.3),
    "gated": lambda: VisionTransformer(**SMALL, attn_layer="diff"),
    "post-norm": lambda: VisionTransformer(**SMALL, block_fn=ResPostBlock),
    "parallel": lambda: VisionTransformer(**SMALL, block_fn=ParallelScalingBlock),
    "parallel with bias": lambda: VisionTransformer(
        **SMALL, block_fn=ParallelScalingBlock, qkv_bias=False
    ),
    "parallel differential": lambda: VisionTransformer(**SMALL, block_fn=DiffParallelScalingBlock),
    "side by side": lambda: VisionTransformer(**SMALL, block_fn=ParallelThingsBlock),
    "eva class token": lambda: Eva(**SMALL, use_rot_pos_emb=True, global_pool="token"),
    "eva post-norm class token": lambda: Eva(
        **SMALL, use_rot_pos_emb=True, use_post_norm=True, global_pool="token"
    ),
}


def lively(make):
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32)


def check_equal(model, images):
    """Logits as with all rows, in fewer multiply-accumulates; gradients too."""
    assert model.reads_class_tokens
    parameters = [p for p in model.vit.parameters() if p.requires_grad]
    short, full = model(images), model.run(images).logits
    torch.testing.assert_close(short, full, atol=1e-5, rtol=1e-4)
    found, wanted = (
        torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)
        for logits in (short, full)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("strategy", [tdm.Strategy, lambda: tdm.TDM(0.5, (1, 2)), lambda: []])
@pytest.mark.parametrize("name", OTHERS)
def test_every_block_and_head(name, strategy, images):
    check_equal(tdm.attach(lively(OTHERS[name]), strategy()), images)


@pytest.mark.parametrize("name", MODELS)
def test_families(name, images):
    model = tdm.attach(made(name), tdm.ToMe(2))
    with torch.no_grad():
        torch.testing.assert_close(model(images), model.run(images).logits, atol=1e-5, rtol=1e-4)
    assert model.reads_class_tokens == (getattr(model.vit, "global_pool", "") == "token")


ALL = {
    **STRATEGIES,
    "ward": lambda: tdm.WardTDM(0.7, (1, 2, 3)),
    "pitome": lambda: tdm.PiToMe(0.9),
    "tofu": lambda: tdm.ToFu(4),
    "mctf": lambda: tdm.MCTF(4),
    "mame": lambda: tdm.MaMe(layers=(1, 2, 3)),
    "stack": lambda: [tdm.SViTE(), tdm.TDM(0.5, (1, 3))],
}


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_strategies(name):
    pooling = "avg" if name == "evovit" else "token"
    model = tdm.attach(wide(global_pool=pooling), ALL[name]())
    torch.manual_seed(7)
    for parameter in model.strategy.parameters():
        parameter.normal_(std=0.3)
    assert model.reads_class_tokens == (name != "avit" and pooling == "token")
    images = torch.randn(3, 3, 32, 48, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(6)
    short = model(images)
    torch.manual_seed(6)
    torch.testing.assert_close(short, model.run(images).logits, atol=1e-5, rtol=1e-4)


def test_it_saves_what_facts_say():
    vit = timm.create_model("deit_small_patch16_224")
    plain = mac_report(tdm.attach(vit, []))
    # queries, projection and MLP of 196 of 197 rows, and their products with keys and values
    width, rows, tokens = 384, 196, 197
    saved = rows * (2 * width**2 + 8 * width**2 + 2 * tokens * width)
    assert plain.backbone - plain.forward == saved
    assert saved / plain.backbone == pytest.approx(0.069, abs=5e-4)
    reduced = mac_report(tdm.attach(vit, tdm.TDM()))
    assert 0.03 < (reduced.total - reduced.forward) / reduced.total < 0.04
    assert reduced.backbone == tdm.flops.count_macs(tdm.attach(vit, tdm.TDM()))  # as papers count


def test_a_merge_in_the_last_block_is_left_out(images):
    vit = lively(OTHERS["registers"])
    every, but_last = (tdm.attach(vit, tdm.TopK(0.5, layers)) for layers in ((1, 3), (1,)))
    with torch.no_grad():
        torch.testing.assert_close(every(images), every.run(images).logits)
    assert len(operations(lambda: every(images))) == len(operations(lambda: but_last(images)))


def listeners():
    def hook(*_):
        return None

    return {
        "hook point": lambda model: model.hook_points[-1].register_forward_hook(hook),
        "inside the block": lambda model: model.vit.blocks[-1].mlp.register_forward_hook(hook),
        "before the norm": lambda model: model.vit.norm.register_forward_pre_hook(hook),
    }


@pytest.mark.parametrize("where", listeners())
def test_listeners_get_all_rows(where, images):
    model = tdm.attach(lively(OTHERS["registers"]), tdm.EViT(0.5, (1,)))
    assert model.reads_class_tokens
    handle = listeners()[where](model)
    assert not model.reads_class_tokens
    seen = []
    model.vit.norm.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    logits = model(images)
    handle.remove()
    assert seen[0] > model.vit.num_prefix_tokens
    torch.testing.assert_close(logits, model.run(images).logits)


def test_features_and_traces_have_all_rows(images):
    model = tdm.attach(lively(OTHERS["registers"]), tdm.TDM(0.5, (1,)))
    rows = 5 + 8  # class and register tokens, half of sixteen patches
    assert model.forward_features(images).shape[1] == rows
    assert model.run(images).features.shape[1] == rows
    assert model.run(images, trace=True, logits_alone=True).features.shape[1] == rows
    assert model.run(images, logits_alone=True).features.shape[1] == 1
    assert model.trace(images)[1].token_counts == [16, 8, 8, 8]


def test_average_pooling_reads_all_rows(images):
    model = tdm.attach(lively(lambda: VisionTransformer(**SMALL, global_pool="avg")), tdm.ToMe(2))
    assert not model.reads_class_tokens


class Marked(tdm.TDM):
    """What a user may do: change class tokens behind a block."""

    def after_block(self, index, tokens):
        return tokens.replace(x=tokens.x * 1.5)


def test_a_users_hook_is_heeded(images):
    model = tdm.attach(lively(OTHERS["registers"]), Marked(0.5, (1,)))
    assert not model.reads_class_tokens
    torch.testing.assert_close(model(images), model.run(images).logits)


def test_layers_that_are_not_torchs_own_are_called(images):
    """LoRA and its kin put a layer of their own in a linear one's place."""

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    vit = lively(OTHERS["registers"])
    qkv = vit.blocks[-1].attn.qkv
    doubled = Doubled(qkv.in_features, qkv.out_features)
    doubled.load_state_dict(qkv.state_dict())
    vit.blocks[-1].attn.qkv = doubled
    check_equal(tdm.attach(vit, tdm.TDM(0.5, (1,))), images)


def test_checkpointed_activations(images):
    model = tdm.attach(lively(OTHERS["registers"]), tdm.TDM(0.5, (1,))).train()
    plain = copy.deepcopy(model)
    model.vit.set_grad_checkpointing(True)
    for one in (model, plain):
        one(images).square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-3)
