"""Wrapping timm's ViTs: which can be reduced, what stays as timm has it, and what is refused."""

import copy
import functools

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

import tdm_lightning as tdm
from tdm_lightning.vit.adapters import adapter_for, model_info

LAYERS = (1, 2)


def small(distilled=False, **kwargs):
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 5,
        **kwargs,
    }
    vit = (VisionTransformerDistilled if distilled else VisionTransformer)(**arguments).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if parameter.ndim > 1 or "gamma" in name:
                parameter.normal_(std=0.2)
    return vit


#: Families of timm's VisionTransformer class, by what sets them apart.
FAMILIES = {
    "deit": {},
    "deit-distilled": {"distilled": True},
    "deit-iii": {"init_values": 1e-5, "no_embed_class": True},
    "dinov2-registers": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
    "clip": {"pre_norm": True, "norm_layer": functools.partial(nn.LayerNorm, eps=1e-5)},
    "augreg-avg": {"global_pool": "avg", "fc_norm": True},
    "no-class-token": {"class_token": False, "global_pool": "avg"},
    "no-class-token-registers": {"class_token": False, "global_pool": "avg", "reg_tokens": 2},
    "siglip-map": {"class_token": False, "global_pool": "map"},
    "avgmax": {"global_pool": "avgmax"},
    "max": {"global_pool": "max"},
    "pool-with-prefix": {"global_pool": "avg", "pool_include_prefix": True},
    "qk-norm": {"qk_norm": True},
    "no-qkv-bias": {"qkv_bias": False},
    "res-post": {"block_fn": ResPostBlock, "init_values": 1e-5},
    "parallel-scaling": {"block_fn": ParallelScalingBlock},
    "parallel-things": {"block_fn": ParallelThingsBlock},
    "dynamic-size": {"dynamic_img_size": True},
}
every_family = pytest.mark.parametrize("kwargs", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32)


@every_family
@torch.no_grad()
def test_keep_rate_1_is_timms_model(images, kwargs):
    vit = small(**kwargs)
    model = tdm.attach(vit, tdm.TDM(1.0, LAYERS))
    torch.testing.assert_close(model(images), vit(images), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        model.forward_features(images), vit.forward_features(images), atol=1e-5, rtol=1e-5
    )
    assert model.vit is vit
    assert tdm.detach(model) is vit


@every_family
@pytest.mark.parametrize("features", ["tokens", "normed", "keys"])
@torch.no_grad()
def test_tokens_fall_at_07(images, kwargs, features):
    vit = small(**kwargs)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    plain = vit(images)
    model = tdm.attach(vit, tdm.TDM(0.7, LAYERS, tdm.TokenMerger(features=features)))
    output = model.run(images, trace=True)
    assert output.trace.token_counts == [16, 12, 9, 9]
    assert output.features.shape[1] == 9 + vit.num_prefix_tokens
    assert output.logits.shape == plain.shape
    assert not torch.equal(output.logits, plain)
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert torch.equal(vit(images), plain)


@torch.no_grad()
def test_timms_own_names():
    for name in ("test_vit", "test_vit2", "test_vit3", "test_vit4"):
        vit = timm.create_model(name, img_size=64).eval()
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(tdm.attach(vit, tdm.TDM(1.0, (1,)))(x), vit(x))
        assert tdm.attach(vit, tdm.TDM(0.5, (1,))).trace(x)[1].token_counts[-1] == 8


@torch.no_grad()
def test_importance_comes_from_the_class_tokens_rows(images):
    """Against the full map of timm's unfused attention, spelled out."""
    for kwargs, rows in (
        (FAMILIES["deit"], 1),
        (FAMILIES["deit-distilled"], 2),
        (FAMILIES["dinov2-registers"], 1),
    ):
        vit = small(**kwargs)
        assert model_info(vit).class_tokens == rows
        inputs = []
        handle = vit.blocks[1].attn.qkv.register_forward_pre_hook(
            lambda module, args, kept=inputs: kept.append(args[0])
        )
        seen = tdm.attach(vit, tdm.EViT(0.7, (1,))).trace(images)[1].layers[0].importance
        handle.remove()
        q, k, _ = vit.blocks[1].attn.qkv(inputs[0]).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        full = (q @ k.transpose(-2, -1) / 4).softmax(-1)
        torch.testing.assert_close(
            seen, full[:, :, :rows, vit.num_prefix_tokens :].mean(dim=(1, 2)), atol=1e-6, rtol=1e-4
        )


@pytest.mark.parametrize(
    "family", ["augreg-avg", "no-class-token", "siglip-map", "avgmax", "max", "pool-with-prefix"]
)
@torch.no_grad()
def test_pooling_counts_a_token_as_often_as_it_has_patches(family):
    """The weighted head equals timm's own on tokens repeated ``size`` times."""
    vit = small(**FAMILIES[family])
    prefix, sizes = vit.num_prefix_tokens, torch.tensor([1, 4, 2, 3])
    features = torch.randn(1, prefix + 4, 32)
    repeated = torch.cat(
        (features[:, :prefix], features[:, prefix:].repeat_interleave(sizes, dim=1)), dim=1
    )
    weighted = adapter_for(vit).head(vit, features, sizes.float().unsqueeze(0))
    torch.testing.assert_close(weighted, vit.forward_head(repeated), atol=1e-5, rtol=1e-4)
    if family != "max":
        assert not torch.allclose(weighted, vit.forward_head(features), atol=1e-4)
    torch.testing.assert_close(
        adapter_for(vit).head(vit, features, sizes.float().unsqueeze(0), pre_logits=True),
        vit.forward_head(repeated, pre_logits=True),
        atol=1e-5,
        rtol=1e-4,
    )


@torch.no_grad()
def test_sizes_are_the_numbers_of_patches(images):
    output = tdm.attach(small(**FAMILIES["no-class-token"]), tdm.TDM(0.5, LAYERS)).run(
        images, trace=True
    )
    for image in range(2):
        held = output.trace.layers[-1].assignment[image]
        assert output.size[image].tolist() == held.bincount(minlength=4).tolist()
        assert output.size[image].sum() == 16


# Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "no sequence of transformer blocks"),
        ("swin_tiny_patch4_window7_224", "runs in windows"),
        ("mixer_s32_224", "none of the ViT classes that have an adapter"),
    ],
)
def test_models_that_cannot_be_reduced_are_refused_with_the_reason(name, reason):
    with torch.device("meta"):
        other = timm.create_model(name)
    with pytest.raises(
        TypeError, match=f"cannot reduce the tokens of {type(other).__name__}: .*{reason}"
    ):
        tdm.attach(other, tdm.TDM())


def test_unknown_blocks_and_attentions_are_refused():
    class Odd(nn.Module):
        pass

    vit = small()
    vit.blocks[2] = Odd()
    with pytest.raises(TypeError, match=r"its blocks are .*Odd; supported are Block"):
        tdm.attach(vit, tdm.TDM(layers=LAYERS))
    vit = small()
    vit.blocks[2].attn = Odd()
    with pytest.raises(TypeError, match="its attention is Odd; supported are"):
        tdm.attach(vit, tdm.TDM(layers=LAYERS))


def test_arguments_of_the_wrong_kind():
    for wrong in ("test_vit", None, VisionTransformer, timm.create_model):
        with pytest.raises(TypeError, match=r"takes a timm model"):
            tdm.attach(wrong, tdm.TDM())
    for wrong in ("TDM", tdm.TDM, tdm.TokenMerger(), None):
        with pytest.raises(TypeError, match="strategy must be a Strategy"):
            tdm.attach(small(), wrong)


def test_a_reduced_model_is_not_reduced_again():
    model = tdm.attach(small(), tdm.TDM(layers=LAYERS))
    with pytest.raises(ValueError, match=r"reduced already, by TDM.*detach"):
        tdm.attach(model, tdm.EViT())


def test_a_plain_model_cannot_be_detached():
    with pytest.raises(TypeError, match="got a VisionTransformer"):
        tdm.detach(small())


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 4, 32, 32), (3, 32, 32), (2, 3, 32)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"images must have shape B×3×H×W"):
        tdm.attach(small(), tdm.TDM(layers=LAYERS))(torch.zeros(shape))


def test_images_of_another_size():
    with pytest.raises(
        ValueError, match=r"must be 32×32 for this model, got 40×32.*dynamic_img_size"
    ):
        tdm.attach(small(), tdm.TDM(layers=LAYERS))(torch.zeros(1, 3, 40, 32))
    model = tdm.attach(small(dynamic_img_size=True), tdm.TDM(layers=LAYERS))
    assert model.trace(torch.zeros(1, 3, 40, 32))[1].token_counts == [20, 14, 10, 10]
    with pytest.raises(
        ValueError, match=r"multiple of the patch size 8×8 for this model, got 41×32"
    ):
        model(torch.zeros(1, 3, 41, 32))


# One model, several wrappers ------------------------------------------------------------------


@torch.no_grad()
def test_one_timm_model_may_be_wrapped_often_and_one_strategy_used_twice(images):
    vit, strategy = small(), tdm.TDM(0.5, LAYERS)
    first, second = tdm.attach(vit, strategy), tdm.attach(vit, tdm.EViT(0.5, LAYERS))
    third = tdm.attach(small(), strategy)
    wanted = first(images)
    second(images)
    third(images)
    assert torch.equal(first(images), wanted)


def test_mode_is_the_timm_models():
    for mode in (True, False):
        model = tdm.attach(small().train(mode), tdm.TDM(layers=LAYERS))
        assert model.training is mode
        assert all(module.training is mode for module in model.modules())


# timm's tools ---------------------------------------------------------------------------------


def merged(groups):
    """Groups of the same settings put together."""
    found = {}
    for group in groups:
        key = (round(group["weight_decay"], 6), round(group.get("lr_scale", 1.0), 9))
        found.setdefault(key, set()).update(id(parameter) for parameter in group["params"])
    return found


@every_family
def test_optimizer_groups_are_those_of_the_timm_model(kwargs):
    vit = small(**kwargs)
    model = tdm.attach(vit, tdm.TDM(layers=LAYERS))
    skip, own = vit.no_weight_decay(), model.no_weight_decay()
    assert own == {f"vit.{name}" for name in skip}
    for groups in (
        lambda m: param_groups_weight_decay(m, 0.05, no_weight_decay_list=m.no_weight_decay()),
        lambda m: param_groups_layer_decay(
            m, 0.05, no_weight_decay_list=m.no_weight_decay(), layer_decay=0.7
        ),
        lambda m: create_optimizer_v2(m, "adamw", lr=1e-3, weight_decay=0.05).param_groups,
        lambda m: (
            create_optimizer_v2(
                m, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7
            ).param_groups
        ),
    ):
        assert merged(groups(model)) == merged(groups(vit))
    no_decay = merged(
        param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    )[0.0, 1.0]
    for name in ("pos_embed", "cls_token"):
        parameter = getattr(vit, name)
        assert parameter is None or id(parameter) in no_decay


@torch.no_grad()
def test_what_timm_asks_of_a_model_is_answered():
    vit = small(distilled=False)
    model = tdm.attach(vit, tdm.TDM(layers=LAYERS))
    for name in (
        "num_features",
        "head_hidden_size",
        "embed_dim",
        "num_classes",
        "num_prefix_tokens",
        "global_pool",
        "feature_info",
    ):
        assert getattr(model, name) == getattr(vit, name)
    assert model.get_classifier() is vit.head
    model.reset_classifier(7)
    assert model.num_classes == 7
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    named = timm.create_model("test_vit")
    assert tdm.attach(named, tdm.TDM(layers=LAYERS)).pretrained_cfg is named.pretrained_cfg
    data = timm.data.resolve_model_data_config(tdm.attach(named, tdm.TDM(layers=LAYERS)))
    assert data == timm.data.resolve_model_data_config(named)


@every_family
def test_gradient_checkpointing_gives_equal_gradients(images, kwargs):
    vit = small(**kwargs)
    model = tdm.attach(vit, tdm.TDM(0.6, LAYERS)).train()

    def gradients(checkpointing):
        model.zero_grad()
        model.set_grad_checkpointing(checkpointing)
        out = model(images)
        logits = out if torch.is_tensor(out) else sum(out)
        logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain, remade = gradients(False), gradients(True)
    assert vit.grad_checkpointing
    assert plain.keys() == remade.keys()
    assert "vit.patch_embed.proj.weight" in plain
    for name, gradient in plain.items():
        torch.testing.assert_close(remade[name], gradient, msg=name)


@torch.no_grad()
def test_deepcopy_and_moving_average(images):
    model = tdm.attach(small(), tdm.TDM(0.6, LAYERS))
    model(images)
    twin, average = copy.deepcopy(model), ModelEmaV3(model, decay=0.5)
    wanted = model(images)
    assert torch.equal(twin(images), wanted)
    assert torch.equal(average.module(images), wanted)
    for parameter in model.parameters():
        parameter.add_(1.0)
    average.update(model)
    assert torch.equal(twin(images), wanted)
    torch.testing.assert_close(average.module.vit.head.bias, model.vit.head.bias - 0.5)


@pytest.mark.parametrize("family", ["deit", "dinov2-registers", "no-class-token", "deit-distilled"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("indices", "count"), [(None, 4), (2, 2), ([0, 3], 2), ([-1], 1)])
@torch.no_grad()
def test_forward_intermediates_is_timms(images, family, norm, indices, count):
    vit = small(**FAMILIES[family])
    for output_fmt, shape in (("NCHW", (2, 32, 4, 4)), ("NLC", (2, 16, 32))):
        arguments = {"indices": indices, "norm": norm, "output_fmt": output_fmt}
        reduced = tdm.attach(vit, tdm.TDM(0.6, LAYERS)).forward_intermediates(
            images, intermediates_only=True, **arguments
        )
        assert [tuple(x.shape) for x in reduced] == [shape] * count
        model = tdm.attach(vit, tdm.TDM(1.0, LAYERS))
        for flags in ({}, {"return_prefix_tokens": True}):
            final, found = model.forward_intermediates(images, **arguments, **flags)
            wanted_final, wanted = vit.forward_intermediates(images, **arguments, **flags)
            torch.testing.assert_close(final, wanted_final)
            torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_dense_features_are_those_of_the_token_that_holds_the_patch(images):
    model = tdm.attach(small(), tdm.EViT(0.5, LAYERS, fuse=False))
    assignment = model.trace(images)[1].layers[-1].assignment
    final, (dense,) = model.forward_intermediates(images, indices=1, norm=True, output_fmt="NLC")
    for image in range(2):
        for patch, token in enumerate(assignment[image].tolist()):
            wanted = torch.zeros(32) if token < 0 else final[image, 1 + token]
            torch.testing.assert_close(dense[image, patch], wanted)
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC'"):
        model.forward_intermediates(images, output_fmt="NHWC")


@torch.no_grad()
def test_taps_fire_once_per_block_with_its_tokens(images):
    model = tdm.attach(small(), tdm.TDM(0.7, LAYERS))
    seen = []
    handles = [
        point.register_forward_hook(lambda module, args, out, i=i: seen.append((i, out.shape[1])))
        for i, point in enumerate(model.hook_points)
    ]
    model(images)
    assert seen == [(0, 17), (1, 13), (2, 10), (3, 10)]
    for handle in handles:
        handle.remove()


def test_training_moves_every_parameter(images):
    """Gradients reach queries and keys of the reducing layers also through the combination
    weights.
    """
    model = tdm.attach(small(), tdm.TDM(0.6, LAYERS)).train()
    optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    nn.functional.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
