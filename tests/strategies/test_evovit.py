"""Evo-ViT: against the official code in all its modes, and with stand-ins for the waiting
tokens.
"""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.core import ModelInfo, Role, Tokens
from tdm_lightning.strategies.evovit import EvoState

INFO = ModelInfo(
    depth=8, patches=64, width=32, heads=2, prefix=1, class_tokens=1, pooling="patches"
)


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 64)


def make_vit(**kwargs):
    """64 patches, 8 blocks, peaked attention."""
    torch.manual_seed(3)
    arguments = {
        "img_size": 64,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 8,
        "num_heads": 2,
        "num_classes": 5,
    }
    vit = VisionTransformer(**{**arguments, "global_pool": "avg", **kwargs}).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight", "proj.weight")):
                parameter.normal_(std=0.25)
    return vit


def small(keep_rate=0.5, **kwargs):
    return tdm.attach(make_vit(), tdm.EvoViT(keep_rate, **{"layers": (2, 5), **kwargs}))


# The official code ----------------------------------------------------------------------------


def close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("tradeoff", [None, [1] * 4 + [0.5] * 8])
def test_official_stages(official, tradeoff):
    _, tensors, model = official("evovit_a", tdm.EvoViT(0.5, tradeoff), global_pool="avg")
    output = model.run(tensors["input"], trace=True)
    close(output.logits, tensors["logits"])
    close(output.features[:, 1:], tensors["patch_tokens"], 1e-3)
    close(output.features[:, 0], tensors["cls"], 1e-3)
    assert [count + 1 for count in output.trace.token_counts] == tensors["token_counts"].tolist()
    assert [layer.index for layer in output.trace.layers] == [4, 8]
    for layer in output.trace.layers:
        order = tensors[f"order_patch.{layer.index}"]
        assert torch.equal(layer.assignment.gather(1, order), torch.arange(64).expand(3, -1))
        assert (layer.role.gather(1, order)[:, :32] == Role.KEPT).all()
        assert (layer.role.gather(1, order)[:, 32:] == Role.PARKED).all()
        close(layer.importance, tensors[f"cls_attn.{layer.index}"], 1e-5)


@torch.no_grad()
def test_official_dropping_of_the_last_placeholders(official):
    _, tensors, model = official("evovit_a", tdm.EvoViT(0.5, drop_last=True), global_pool="avg")
    output = model.run(tensors["input"], trace=True)
    close(output.logits, tensors["prunecls.logits"])
    close(output.features[:, 1:], tensors["prunecls.patch_tokens"], 1e-3)
    last = output.trace.layers[-1]
    assert torch.equal(last.role == Role.DROPPED, last.assignment < 0)
    assert (last.assignment < 0).sum(1).tolist() == [32] * 3


@torch.no_grad()
def test_official_training(official):
    _, tensors, model = official(
        "evovit_a", tdm.EvoViT(0.5, class_head=True, layerwise_epochs=200), global_pool="avg"
    )
    model.train()
    output = model.run(tensors["input"])
    close(output.logits, tensors["train.logits"])
    close(output.state.class_logits, tensors["train.logits_cls"])
    model.objective.on_progress(epoch=199, step=0, total_steps=1)
    output = model.run(tensors["input"])
    close(output.logits, tensors["layerwise.train.logits"])
    close(output.state.class_logits, tensors["layerwise.train.logits_cls"])
    model.objective.on_progress(epoch=200, step=0, total_steps=1)
    close(model(tensors["input"]), tensors["train.logits"])


@torch.no_grad()
def test_official_selection_in_every_layer(official):
    _, tensors, model = official("evovit_a", tdm.EvoViT(0.5), global_pool="avg")
    model.strategy.layerwise = True
    output = model.run(tensors["input"], trace=True)
    close(output.logits, tensors["layerwise.logits"])
    close(output.features[:, 1:], tensors["layerwise.patch_tokens"], 1e-3)
    assert [layer.index for layer in output.trace.layers] == list(range(4, 12))
    patch = torch.arange(64).expand(3, -1)
    for step, layer in enumerate(output.trace.layers):
        patch = patch.gather(1, tensors["layerwise.order"][step])
        assert torch.equal(layer.assignment.gather(1, patch), torch.arange(64).expand(3, -1))
        close(layer.importance, tensors["layerwise.cls_attn"][step], 1e-5)


@torch.no_grad()
def test_settings_change_the_official_case(official):
    _, tensors, model = official("evovit_a", tdm.EvoViT(0.5), global_pool="avg")
    for strategy in (
        tdm.EvoViT(0.53),
        tdm.EvoViT(0.5, tradeoff=0.2),
        tdm.EvoViT(0.5, layers=(4, 7)),
        tdm.EvoViT(0.5, representative=True),
        tdm.EvoViT(0.5, merger=tdm.TokenMerger()),
    ):
        other = tdm.attach(model.vit, strategy)(tensors["input"])
        assert (other - tensors["logits"]).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize(
    ("name", "macs", "represented"),
    [
        ("tiny", 817_754_112, 0.822),
        ("small", 3_033_391_104, 3.049),
        ("base", 11_658_313_728, 11.717),
    ],
)
def test_multiply_accumulates(name, macs, represented):
    with torch.device("meta"):
        vit = timm.create_model(f"deit_{name}_patch16_224", global_pool="avg")
    model = tdm.attach(vit, tdm.EvoViT(0.5))
    assert tdm.flops.count_macs(model) == macs
    assert [block.tokens for block in tdm.flops.mac_report(model).blocks] == [196] * 4 + [98] * 8
    gmacs = tdm.flops.count_macs(tdm.attach(vit, tdm.EvoViT(0.5, representative=True))) / 1e9
    assert round(gmacs, 3) == represented


# The running attention ------------------------------------------------------------------------


@torch.no_grad()
def test_running_attention_against_its_definition(images):
    mix = [0.9, 0.3, 0.6, 0.8, 0.2, 0.5, 0.5, 0.5]
    model = small(0.4, tradeoff=mix)
    expected, layer = None, {}
    for index, block in enumerate(model.vit.blocks):
        layer[index] = block.attn
    seen = {}
    for index in range(5):
        layer[index].qkv.register_forward_hook(
            lambda module, args, out, index=index: seen.__setitem__(index, args[0])
        )
    _, trace = model.trace(images)
    kept = int(0.4 * 64)
    for index in range(5):
        x, attention = seen[index], layer[index]
        q, k, _ = attention.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        summed = ((q @ k.transpose(-1, -2)) * attention.scale).softmax(-1)[:, :, 0, 1:].sum(1)
        if index == 2:
            torch.testing.assert_close(trace.layers[0].importance, expected, atol=1e-5, rtol=1e-4)
            expected = expected.sort(1, descending=True).values
        if expected is None:
            expected = summed
        else:
            here = summed.shape[1]
            assert here == (64 if index < 2 else kept)
            expected = torch.cat(
                ((1 - mix[index]) * expected[:, :here] + mix[index] * summed, expected[:, here:]), 1
            )
    torch.testing.assert_close(trace.layers[1].importance, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_one_number_is_that_number_in_every_block(images):
    vit = make_vit()
    one, many = (
        tdm.attach(vit, tdm.EvoViT(0.5, tradeoff=t, layers=(2, 5))) for t in (0.3, [0.3] * 8)
    )
    assert torch.equal(one(images), many(images))


def test_importance_is_only_asked_for_where_it_is_used():
    def asked(**kwargs):
        strategy = tdm.EvoViT(0.5, **kwargs)
        return [index for index in range(12) if strategy.needs(index, INFO)]

    assert asked() == [3, 4, 5, 6, 7]
    assert asked(tradeoff=0.5) == list(range(8))
    assert asked(layers=()) == []


# What waits and comes back --------------------------------------------------------------------


@torch.no_grad()
def changes_of_the_waiting(model, images):
    """Run to the last selection and to the end; what became of the tokens that waited in between,
    B×P×C, and their groups.
    """
    strategy, seen = model.strategy, {}
    original = strategy.before_block

    def spy(index, tokens):
        tokens = original(index, tokens)
        if index == 5:
            seen["parked"], seen["group"] = tokens.state.parked, tokens.state.stands_for
            seen["start"] = tokens.state.stand_in
        return tokens

    strategy.before_block = spy
    features = model.forward_features(images)
    del strategy.before_block
    return features[:, -seen["parked"].shape[1] :] - seen["parked"], seen


def test_without_a_stand_in_nothing_happens_to_them(images):
    change, _ = changes_of_the_waiting(small(), images)
    assert (change == 0).all()


def test_a_representative_changes_all_alike(images):
    change, seen = changes_of_the_waiting(small(representative=True), images)
    torch.testing.assert_close(change, change[:, :1].expand_as(change), atol=1e-4, rtol=1e-4)
    assert change.abs().amax((1, 2)).min() > 1e-2
    assert seen["start"].shape == (2, 1, 32)


def test_every_cluster_gets_its_own_change(images):
    change, seen = changes_of_the_waiting(small(merger=tdm.TokenMerger()), images)
    group = seen["group"]
    assert group.shape == (2, 32)
    assert group.unique().numel() == 8  # ceil(0.25·32)
    for image in range(2):
        means = torch.stack([change[image][group[image] == g].mean(0) for g in range(8)])
        torch.testing.assert_close(change[image], means[group[image]], atol=1e-4, rtol=1e-3)
        assert torch.pdist(means).min() > 1e-3


@pytest.mark.parametrize("proportional", [True, False])
def test_stand_ins_attract_attention_for_all_they_stand_for(proportional):
    merger = tdm.TokenMerger(proportional_attention=proportional)
    strategy = tdm.EvoViT(0.5, layers=(2, 5), merger=merger)
    state = EvoState(attention=torch.rand(2, 64))
    tokens = Tokens(torch.randn(2, 65, 32), 1, INFO, state=state)
    tokens = strategy.before_block(2, tokens)
    if not proportional:
        assert tokens.key_bias is None
        return
    prefix, stand_ins, updated = tokens.key_bias.exp().split((1, 8, 32), dim=-1)
    assert (prefix == 1).all()
    assert (updated == 1).all()
    members = torch.nn.functional.one_hot(tokens.state.stands_for, 8).sum(1)
    torch.testing.assert_close(stand_ins.flatten(1), members.float())
    assert strategy.finish(tokens).key_bias is None


@torch.no_grad()
def test_one_group_is_the_representative(images):
    vit = make_vit()
    one = tdm.attach(
        vit,
        tdm.EvoViT(
            0.5,
            layers=(2, 5),
            merger=tdm.TokenMerger(cluster_fraction=0.01, proportional_attention=False),
        ),
    )
    representative = tdm.attach(vit, tdm.EvoViT(0.5, layers=(2, 5), representative=True))
    torch.testing.assert_close(one(images), representative(images))
    assert not torch.allclose(
        one(images), tdm.attach(vit, tdm.EvoViT(0.5, layers=(2, 5)))(images), atol=1e-3
    )
    assert one.trace(images)[1].token_counts == [64, 64] + [32] * 6


@torch.no_grad()
def test_the_merger_leaves_the_selection_as_it_is(images):
    vit = make_vit()
    _, merged = tdm.attach(vit, tdm.EvoViT(0.5, layers=(2, 5), merger=tdm.TokenMerger())).trace(
        images
    )
    _, plain = tdm.attach(vit, tdm.EvoViT(0.5, layers=(2, 5))).trace(images)
    assert torch.equal(merged.layers[0].role, plain.layers[0].role)
    assert torch.equal(merged.layers[0].assignment, plain.layers[0].assignment)


@pytest.mark.parametrize("kwargs", [{"merger": tdm.TokenMerger()}, {"representative": True}])
def test_gradients_reach_the_importance_through_the_stand_ins(images, kwargs):
    """The class token's query in the block before a selection acts through the weights of the
    stand-ins.
    """
    model = small(**kwargs)
    images.requires_grad_()
    model(images).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# Class head -----------------------------------------------------------------------------------


def test_parameters_while_training():
    with torch.device("meta"):
        vits = [
            timm.create_model(f"deit_{name}_patch16_224", global_pool="avg")
            for name in ("tiny", "small", "base")
        ]
    models = [tdm.attach(vit, tdm.EvoViT(class_head=True)) for vit in vits]
    assert [sum(p.numel() for p in m.parameters()) for m in models] == [
        5_910_800,
        22_436_432,
        87_338_192,
    ]
    assert [tdm.flops.mac_report(m).learned for m in models] == [
        0,
        0,
        0,
    ]  # inference does not use it


def test_half_the_loss_comes_from_the_class_token(images):
    model, labels = small(class_head=True).train(), torch.tensor([1, 4])
    output = model.run(images)
    terms = model.objective.loss(output, labels, F.cross_entropy)
    assert terms.keys() == {"task", "class_head"}
    torch.testing.assert_close(terms["task"], 0.5 * F.cross_entropy(output.logits, labels))
    torch.testing.assert_close(
        terms["class_head"], 0.5 * F.cross_entropy(output.state.class_logits, labels)
    )
    sum(terms.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.strategy.parameters())
    model.eval()
    assert model.objective.loss(model.run(images), labels, F.cross_entropy).keys() == {"task"}


def test_the_class_head_follows_another_number_of_classes(images):
    model = small(class_head=True).train()
    model.reset_classifier(9)
    output = model.run(images)
    assert output.logits.shape == output.state.class_logits.shape == (2, 9)


def test_official_weights_load_with_and_without_the_class_head(official, golden):
    _, tensors = golden("evovit_a")
    for class_head in (False, True):
        _, _, model = official("evovit_a", tdm.EvoViT(class_head=class_head), global_pool="avg")
        assert torch.equal(model.vit.fc_norm.weight, tensors["state_dict.norm.weight"])
        if class_head:
            assert torch.equal(
                model.strategy.head_cls.weight, tensors["state_dict.head_cls.weight"]
            )
    weights = {
        name[11:]: value for name, value in tensors.items() if name.startswith("state_dict.")
    }
    for missing in ("vs.3.v.weight", "qks.5.qk.bias", "projs.0.weight"):
        with pytest.raises(ValueError, match="does not fit this model; nothing was loaded"):
            tdm.checkpoints.load_official(
                model, {name: value for name, value in weights.items() if name != missing}
            )


# Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vit", "strategy", "message"),
    [
        ({"global_pool": "token"}, {}, r"global_pool='avg'"),
        ({}, {"layers": (2, 8)}, "do not exist"),
        ({}, {"tradeoff": [0.5] * 7}, "one number per block, 8 here, got 7"),
        ({}, {"keep_rate": 0.01}, "leaves none of 64"),
        ({"class_token": False}, {"class_head": True}, "needs a model with a class token"),
        ({"num_classes": 0}, {"class_head": True}, "and a classifier"),
    ],
)
def test_models_that_do_not_fit(vit, strategy, message):
    with pytest.raises(ValueError, match=message):
        tdm.attach(make_vit(**vit), tdm.EvoViT(**{"layers": (2, 5), **strategy}))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": (0, 4)}, ValueError, "at least 1"),
        ({"tradeoff": 1.5}, ValueError, r"\[0, 1\]"),
        ({"tradeoff": [0.5, float("nan")]}, ValueError, r"\[0, 1\]"),
        ({"tradeoff": "0.5"}, TypeError, "number"),
        ({"tradeoff": [0.5, "1"]}, TypeError, "numbers"),
        ({"representative": True, "merger": tdm.TokenMerger()}, ValueError, "choose one"),
        ({"layerwise_epochs": -1}, ValueError, "layerwise_epochs"),
        ({"keep_rate": 1.1}, ValueError, "keep_rate"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        tdm.EvoViT(**arguments)


@torch.no_grad()
def test_no_class_token_is_fine_without_a_class_head(images):
    model = tdm.attach(
        make_vit(class_token=False), tdm.EvoViT(0.5, layers=(2, 5), merger=tdm.TokenMerger())
    )
    logits, trace = model.trace(images)
    assert logits.isfinite().all()
    assert trace.token_counts == [64, 64] + [32] * 6
