"""The laws that TDM and EViT obey, on any model and image."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.core import History, Role, Tokens
from tdm_lightning.ops import class_importance
from tdm_lightning.vit.adapters import attention, model_info
from tests.helpers.exporting import check_compiled, check_exported
from tests.helpers.vits import lively

MERGERS = {
    "default": lambda: tdm.TokenMerger(),
    "other": lambda: tdm.TokenMerger(
        density="knn",
        matching="greedy",
        features="keys",
        proportional_attention=True,
    ),
}
STRATEGIES = {
    "tdm": lambda rate=0.7: tdm.TDM(rate),
    "tdm-other": lambda rate=0.7: tdm.TDM(rate, merger=MERGERS["other"]()),
    "evit": lambda rate=0.7: tdm.EViT(rate),
    "evit-drop": lambda rate=0.7: tdm.EViT(rate, fuse=False),
    "evit-merger": lambda rate=0.7: tdm.EViT(rate, merger=MERGERS["default"]()),
}
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)


def make_vit(**kwargs):
    """A small ViT whose attention is peaked, so that decisions are not near ties."""
    torch.manual_seed(1)
    arguments = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 12,
        "num_heads": 2,
        "num_classes": 5,
        **kwargs,
    }
    return lively(VisionTransformer(**arguments).eval())


@pytest.fixture(scope="module")
def vit():
    return make_vit()


@pytest.fixture(scope="module")
def shallow():
    """For tracing, whose cost grows with the depth."""
    return make_vit(depth=4)


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32)


def early(strategy):
    """The same strategy in the middle of four blocks."""
    return type(strategy)(**{**arguments(strategy), "layers": (1, 2)})


def arguments(strategy):
    """What a strategy was made with, its merger as it is."""
    return {name: getattr(strategy, name) for name in strategy.config()["init_args"]}


# 1 --------------------------------------------------------------------------------------------


@every_strategy
@torch.no_grad()
def test_keep_rate_1_is_the_plain_model(vit, images, strategy):
    model = tdm.attach(vit, strategy(1.0))
    torch.testing.assert_close(model(images), vit(images))
    logits, trace = model.trace(images)
    assert torch.equal(logits, vit(images))
    assert trace.token_counts == [64] * 12
    assert trace.layers == []


# 2, 3 -----------------------------------------------------------------------------------------


@every_strategy
@given(rate=st.floats(0.02, 1), layers=st.sets(st.integers(0, 11), max_size=4))
@torch.no_grad()
def test_counts_and_the_fate_of_every_patch(vit, strategy, rate, layers):
    chosen = strategy(rate)
    chosen = type(chosen)(**{**arguments(chosen), "layers": tuple(layers)})
    model = tdm.attach(vit, chosen)
    output = model.run(torch.randn(2, 3, 32, 32), trace=True)
    fused = isinstance(chosen, tdm.EViT) and chosen.fuse and chosen.merger is None
    expected, n = [], 64
    for index in range(12):
        if index in layers and math.ceil(rate * n) < n:
            n = math.ceil(rate * n) + (1 if fused else 0)
        expected.append(n)
    assert output.trace.token_counts == expected
    assert output.features.shape == (2, n + 1, 32)
    drops = isinstance(chosen, tdm.EViT) and not chosen.fuse and chosen.merger is None
    for layer in output.trace.layers:
        count = output.trace.token_counts[layer.index]
        assert layer.assignment.shape == layer.role.shape == (2, 64)
        assert layer.assignment.dtype == layer.role.dtype == torch.int64
        for image in range(2):
            held = set(layer.assignment[image].tolist())
            assert held - {-1} <= set(range(count))
            if drops:
                assert (layer.assignment[image] >= 0).sum() == count
                assert torch.equal(layer.assignment[image] < 0, layer.role[image] == Role.DROPPED)
            else:
                assert held == set(range(count)) or fused
                assert -1 not in held or fused
                assert Role.DROPPED not in layer.role[image]


# 4 --------------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize(
    "pooling", [{}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}], ids=str
)
@torch.no_grad()
def test_commutes_with_a_permutation_of_the_patches(strategy, pooling):
    """Positions are added before the first block, so shuffling the embedded patches shuffles all
    the model sees.
    """
    vit = make_vit(**pooling)
    model = tdm.attach(vit, strategy())
    embedded = torch.randn(2, vit.num_prefix_tokens + 64, 32)
    shuffle = torch.randperm(64)
    prefix = vit.num_prefix_tokens
    shuffled = torch.cat((embedded[:, :prefix], embedded[:, prefix:][:, shuffle]), dim=1)
    before, after = through(model, embedded), through(model, shuffled)
    torch.testing.assert_close(before.x, after.x, atol=1e-4, rtol=1e-3)
    assert torch.equal(before.history.source[:, shuffle], after.history.source)


def through(model, embedded):
    """The blocks alone, on tokens B×T×C."""
    info = model_info(model.vit)
    batch, patches = embedded.shape[0], embedded.shape[1] - info.prefix
    history = History(torch.arange(patches).expand(batch, -1))
    size = torch.ones(batch, patches)
    tokens = model.strategy.begin(Tokens(embedded, info.prefix, info, size=size, history=history))
    for index in range(len(model.vit.blocks)):
        tokens = model._block(index, tokens, lambda stage, block: None)
    return model.strategy.finish(tokens)


# 5 --------------------------------------------------------------------------------------------


@every_strategy
def test_no_parameter_and_no_buffer_is_added(vit, strategy):
    model = tdm.attach(vit, strategy())
    assert {f"vit.{name}" for name in vit.state_dict()} == set(model.state_dict())
    assert {id(p) for p in model.parameters()} == {id(p) for p in vit.parameters()}


# 6 --------------------------------------------------------------------------------------------


def everything_kept(model):
    """Every attribute of every module, and every hook and buffer: whatever a pass could leave
    behind.
    """
    return {
        name: {
            key: copy.copy(value) if isinstance(value, (dict, list, set)) else value
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


@every_strategy
@torch.no_grad()
def test_a_pass_leaves_no_state_behind(vit, strategy):
    model = tdm.attach(vit, strategy())
    first, second = torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32)
    kept = everything_kept(model)
    merger = dict(vars(model.strategy.reducer))
    one = model(first), model(second), model.trace(first)[0]
    other = model.trace(second)[0], model(first), model(first)
    assert torch.equal(one[0], other[1])
    torch.testing.assert_close(one[1], other[0])
    torch.testing.assert_close(one[2], other[2])  # with and without the last block's patches
    after = everything_kept(model)
    assert merger == vars(model.strategy.reducer)
    assert kept.keys() == after.keys()
    for name, attributes in kept.items():
        assert attributes.keys() == after[name].keys()
        for key, value in attributes.items():
            assert value is after[name][key] or value == after[name][key], (name, key)


@every_strategy
@torch.no_grad()
def test_without_a_trace_no_source_map_is_made(vit, images, strategy, monkeypatch):
    model = tdm.attach(vit, strategy())
    made = []
    replace = Tokens.replace

    def spy(self, **changes):
        changed = replace(self, **changes)
        made.append((changed.history is None, changed.size is None))
        return changed

    monkeypatch.setattr(Tokens, "replace", spy)
    model(images)
    assert made
    assert all(no_history for no_history, _ in made)
    if not model.strategy.requires().sizes:
        assert all(no_size for _, no_size in made)
    made.clear()
    model.trace(images)
    assert not all(no_history for no_history, _ in made)
    assert not made[-1][0]


# 7 --------------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("pooling", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(images, strategy, pooling):
    model = tdm.attach(make_vit(**pooling), strategy())
    together, trace = model.trace(images)
    for i in range(3):
        alone, own = model.trace(images[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        for layer, single in zip(trace.layers, own.layers, strict=True):
            assert torch.equal(layer.assignment[i], single.assignment[0])


# 8 --------------------------------------------------------------------------------------------


@every_strategy
@torch.no_grad()
def test_compiles_without_a_graph_break(shallow, images, strategy):
    check_compiled(tdm.attach(shallow, early(strategy())), images, backend="aot_eager")


@pytest.mark.parametrize("name", STRATEGIES)
@torch.no_grad()
def test_exports_with_any_batch_size(shallow, images, name, tmp_path):
    onnx = tmp_path / "m.onnx" if name in ("tdm", "evit") else None
    check_exported(tdm.attach(shallow, early(STRATEGIES[name]())), images, onnx)


# 9 --------------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 30])
@torch.no_grad()
def test_half_precision_stays_finite(images, strategy, dtype, scale):
    vit = make_vit()
    vit.pos_embed.mul_(scale)  # a residual stream as large as that of big models
    model = tdm.attach(vit.to(dtype), strategy())
    logits, trace = model.trace(images.to(dtype))
    assert logits.isfinite().all()
    assert logits.dtype == dtype
    assert all(layer.importance.isfinite().all() for layer in trace.layers)


@every_strategy
@pytest.mark.parametrize("pooling", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_autocast_trains_with_finite_gradients(images, strategy, pooling):
    model = tdm.attach(make_vit(**pooling), strategy())
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(images), torch.tensor([0, 1, 2]))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# 10 -------------------------------------------------------------------------------------------


@every_strategy
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_block_attends_through_the_fused_kernel(vit, images, strategy, mode, monkeypatch):
    model = tdm.attach(vit, strategy())
    model.train(mode == "train")
    calls, rows = [], []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    monkeypatch.setattr(
        attention, "class_importance", lambda *a, **k: rows.append(1) or class_importance(*a, **k)
    )
    model(images)
    model.eval()
    assert len(calls) == 12
    assert len(rows) == 3  # one beside the kernel in each reducing layer, nowhere else
