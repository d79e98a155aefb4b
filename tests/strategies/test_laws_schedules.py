"""The laws that hold for the other schedules: what any of them may rely on, on any model and
image.
"""

import copy

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.core import History, Role, Tokens
from tdm_lightning.vit.adapters import model_info
from tests.helpers.exporting import check_compiled, check_exported
from tests.helpers.vits import lively

COUNTS = ([64, 50, 50, 31, 31, 31], [64, 56, 50, 40, 31, 31])
STRATEGIES = {
    "tome": lambda rate=0.7: tdm.ToMe(0 if rate == 1 else 2),
    "ward": lambda rate=0.7: tdm.WardTDM(rate, layers=(1, 3), rounds=2, protect=0.1),
    "pitome": lambda rate=0.7: tdm.PiToMe(rate),
    "tofu": lambda rate=0.7: tdm.ToFu(0 if rate == 1 else 2),
    "diffrate": lambda rate=0.7: tdm.DiffRate(*([64] * 6,) if rate == 1 else COUNTS),
    "mctf": lambda rate=0.7: tdm.MCTF(0 if rate == 1 else 2),
    "mpm": lambda rate=0.7: tdm.MPM(() if rate == 1 else (1, 3)),
    "mame": lambda rate=0.7: tdm.MaMe(0.6, () if rate == 1 else (1, 3)),
    "dpcknn": lambda rate=0.7: tdm.DPCKNN(rate, layers=(1, 3)),
    "dpcknn-learned": lambda rate=0.7: tdm.DPCKNN(rate, layers=(1, 3), learned_weights=True),
    "topk": lambda rate=0.7: tdm.TopK(rate, layers=(1, 3)),
    "random": lambda rate=0.7: tdm.Random(rate, layers=(1, 3)),
    "dyvit": lambda rate=0.7: tdm.DyViT(rate, layers=(1, 3)),
    "dyvit-merger": lambda rate=0.7: tdm.DyViT(rate, layers=(1, 3), merger=tdm.TokenMerger()),
    "dyvit-proportional": lambda rate=0.7: tdm.DyViT(
        rate, layers=(1, 3), merger=tdm.TokenMerger(proportional_attention=True, matching="greedy")
    ),
    "evovit": lambda rate=0.7: tdm.EvoViT(rate, layers=(2, 4)),
    "evovit-dropping": lambda rate=0.7: tdm.EvoViT(rate, layers=(2, 4), drop_last=True),
    "evovit-representative": lambda rate=0.7: tdm.EvoViT(
        rate, layers=(2, 4), representative=True, class_head=True
    ),
    "evovit-merger": lambda rate=0.7: tdm.EvoViT(rate, layers=(2, 4), merger=tdm.TokenMerger()),
}
every_strategy = pytest.mark.parametrize("name", STRATEGIES)
#: Each image has a number of tokens of its own, so counts are no constants and shapes not static.
ADAPTIVE = ("mpm", "mame")
FIXED = [name for name in STRATEGIES if name not in ADAPTIVE]
every_fixed_strategy = pytest.mark.parametrize("name", FIXED)


def make_vit(name, **kwargs):
    """A small ViT with peaked attention, so that decisions are no near ties; pooled as the strategy
    needs.
    """
    torch.manual_seed(2)
    pool = {"global_pool": "avg"} if name.startswith("evovit") else {}
    arguments = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 6,
        "num_heads": 2,
        "num_classes": 5,
    }
    return lively(VisionTransformer(**{**arguments, **pool, **kwargs}).eval())


def reduced(name, *rate, **kwargs):
    model = tdm.attach(make_vit(name, **kwargs), STRATEGIES[name](*rate))
    with torch.no_grad():  # learned scores far from ties too
        for parameter in model.strategy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


@every_strategy
@torch.no_grad()
def test_keep_rate_1_is_the_plain_model(images, name):
    model = reduced(name, 1.0)
    assert torch.equal(model.run(images).logits, model.vit(images))
    torch.testing.assert_close(model(images), model.vit(images))
    _, trace = model.trace(images)
    assert {count for each in trace.token_counts for count in np.ravel(each)} == {64}
    assert trace.layers == []


@every_fixed_strategy
@torch.no_grad()
def test_counts_and_the_fate_of_every_patch(images, name):
    model = reduced(name)
    output = model.run(images, trace=True)
    trace = output.trace
    expected = {
        "tome": [62, 60, 58, 56, 54, 52],
        "mctf": [64, 62, 60, 58, 56, 54],
        "tofu": [62, 60, 58, 56, 54, 52],
        "diffrate": COUNTS[0],
        "pitome": [45, 32, 23, 17, 12, 9],
        "ward": [64, 45, 45, 32, 32, 32],
        "evovit": [64, 64, 44, 44, 44, 44],
    }.get(name.split("-")[0], [64, 44, 44, 31, 31, 31])
    assert trace.token_counts == expected
    for layer in trace.layers:
        kept_count = trace.token_counts[layer.index]
        parks = name.startswith("evovit") and not (name == "evovit-dropping" and layer.index == 4)
        assert layer.assignment.dtype == layer.role.dtype == torch.int64
        assert torch.equal(layer.assignment < 0, layer.role == Role.DROPPED)
        assert torch.equal(layer.assignment >= kept_count, layer.role == Role.PARKED)
        for image in range(3):
            held = set(layer.assignment[image].tolist()) - {-1}
            assert held == set(range(64 if parks else kept_count))
    returned = (
        44 if name == "evovit-dropping" else 64 if name.startswith("evovit") else expected[-1]
    )
    assert output.features.shape == (3, returned + 1, 32)


@every_strategy
@torch.no_grad()
def test_dense_features_follow_every_patch(images, name):
    """A patch's feature is that of the token that holds it; none is zero unless it was dropped."""
    model = reduced(name)
    _, trace = model.trace(images)
    maps = model.forward_intermediates(
        images, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
    )
    for block, (dense, prefix) in enumerate(maps):
        assert dense.shape == (3, 64, 32)
        assert prefix.shape == (3, 1, 32)
        before = [layer for layer in trace.layers if layer.index <= block]
        dropped = before[-1].assignment < 0 if before else torch.zeros(3, 64, dtype=torch.bool)
        assert torch.equal(dense.eq(0).all(-1), dropped)


def through(model, embedded):
    """The blocks alone, on tokens B×T×C."""
    history = History(torch.arange(64).expand(embedded.shape[0], -1))
    size, info = torch.ones(embedded.shape[0], 64), model_info(model.vit)
    tokens = model.strategy.begin(Tokens(embedded, 1, info, size=size, history=history))
    for index in range(6):
        tokens = model._block(index, tokens, lambda stage, block: None)
    return model.strategy.finish(tokens)


BY_PLACE = ("tome", "mctf", "tofu", "random", "ward")


@pytest.mark.parametrize("name", [name for name in FIXED if name not in BY_PLACE])
@torch.no_grad()
def test_commutes_with_a_permutation_of_the_patches(name):
    model = reduced(name)
    embedded, shuffle = torch.randn(2, 65, 32), torch.randperm(64)
    shuffled = torch.cat((embedded[:, :1], embedded[:, 1:][:, shuffle]), dim=1)
    before, after = through(model, embedded), through(model, shuffled)
    torch.testing.assert_close(before.x, after.x, atol=1e-4, rtol=1e-3)
    assert torch.equal(before.history.source[:, shuffle], after.history.source)


@every_strategy
@torch.no_grad()
def test_a_pass_leaves_no_state_behind(images, name):
    model = reduced(name)

    def everything():
        def still(value):
            return copy.copy(value) if isinstance(value, (dict, list, set)) else value

        modules = [
            *model.named_modules(),
            ("merger", getattr(model.strategy, "merger", None) or model),
        ]
        return {
            path: {key: still(value) for key, value in vars(module).items()}
            for path, module in modules
        }

    kept = everything()
    alone, traced, other = model(images[:1]), model.trace(images)[0], model(images)
    torch.testing.assert_close(traced, other)
    assert torch.equal(model(images[:1]), alone)
    after = everything()
    for path, attributes in kept.items():
        assert attributes.keys() == after[path].keys()
        assert all(
            value is after[path][key] or value == after[path][key]
            for key, value in attributes.items()
        )


@every_strategy
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images, name):
    model = reduced(name)
    together, trace = model.trace(images)
    for i in range(3):
        alone, own = model.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        for layer, single in zip(trace.layers, own.layers, strict=True):
            assert torch.equal(layer.assignment[i], single.assignment[0])


DEPTHS = {"evovit": 5, "tome": 2, "mctf": 2, "pitome": 2, "tofu": 2, "diffrate": 6}


def traced(name):
    """As deep as its layers need: tracing takes long."""
    return reduced(
        name,
        depth={"evovit": 5, "tome": 2, "mctf": 2, "pitome": 2, "tofu": 2, "diffrate": 6}.get(
            name.split("-")[0], 4
        ),
    )


@every_fixed_strategy
@torch.no_grad()
def test_compiles_without_a_graph_break(images, name):
    check_compiled(traced(name), images)


@every_fixed_strategy
@torch.no_grad()
def test_exports_with_any_batch_size(images, name, tmp_path):
    onnx = name in ("tome", "ward", "dyvit-merger", "evovit-merger")
    check_exported(traced(name), images, tmp_path / "m.onnx" if onnx else None)


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_stays_finite(images, name, dtype):
    model = reduced(name)
    model.vit.pos_embed.mul_(30)  # a residual stream as large as that of big models
    logits = model.to(dtype)(images.to(dtype))
    assert logits.isfinite().all()
    assert logits.dtype == dtype


@every_strategy
@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast_trains_with_finite_gradients(images, name, checkpointing):
    model = reduced(name).train()
    model.set_grad_checkpointing(checkpointing)
    teacher = model.strategy.requires().teacher and tdm.attach(model.vit, tdm.Strategy()).run(
        images
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = model.run(images)
        terms = model.objective.loss(
            output, torch.tensor([0, 1, 2]), F.cross_entropy, teacher or None
        )
    sum(terms.values()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@every_strategy
@torch.no_grad()
def test_inference_attends_through_the_fused_kernel(images, name, monkeypatch):
    model = reduced(name)
    calls = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    model(images)
    # MCTF needs the map itself in the blocks that merge.
    assert len(calls) == (1 if name == "mctf" else 6)


@every_strategy
def test_comes_back_from_plain_values(images, name):
    strategy = STRATEGIES[name](0.6)
    config = strategy.config()
    again = tdm.Strategy.from_config(config)
    assert type(again) is type(strategy)
    assert again.config() == config


@every_strategy
@torch.no_grad()
def test_works_on_a_copy_of_the_model(images, name):
    model = reduced(name)
    assert torch.equal(copy.deepcopy(model)(images), model(images))
