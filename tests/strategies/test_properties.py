"""What every strategy of the library promises, at any rate, in any layers and types."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer

import tdm_lightning as tdm
from tdm_lightning.core import Role
from tests.helpers.vits import lively

DEPTH, PATCHES = 4, 16


def counts(rate):
    """A list that falls by the rate in every block."""
    return [max(1, round(PATCHES * rate ** (block + 1))) for block in range(DEPTH)]


def high(rate):
    """A rate at which rounding down leaves a token after three layers."""
    return 0.45 + 0.55 * rate


def behind(layers):
    """Those that have a block before them."""
    return tuple(layer for layer in layers if layer) or (1,)


#: Each at a rate in (0, 1] and in layers, as far as it has them.
STRATEGIES = {
    "AViT": lambda rate, layers: tdm.AViT(gate_scale=5.0, gate_center=rate),
    "DPCKNN": lambda rate, layers: tdm.DPCKNN(high(rate), layers),
    "DiffRate": lambda rate, layers: tdm.DiffRate(counts(rate)),
    "DyViT": lambda rate, layers: tdm.DyViT(high(rate), layers or (1,)),
    "EViT": lambda rate, layers: tdm.EViT(rate, layers),
    "EViT, dropping": lambda rate, layers: tdm.EViT(rate, layers, fuse=False),
    "EvoViT": lambda rate, layers: tdm.EvoViT(high(rate), layers=behind(layers)),
    "IARED2": lambda rate, layers: tdm.IARED2(groups=2, threshold=rate * 0.99),
    "MCTF": lambda rate, layers: tdm.MCTF(keep_rate=0.5 + rate / 2),
    "MPM": lambda rate, layers: tdm.MPM(layers),
    "MaMe": lambda rate, layers: tdm.MaMe(rate, layers),
    "PSViT": lambda rate, layers: tdm.PSViT(counts=[*counts(rate)[:-1], 0]),
    "PiToMe": lambda rate, layers: tdm.PiToMe(0.5 + rate / 2),
    "Random": lambda rate, layers: tdm.Random(high(rate), layers),
    "SPViT": lambda rate, layers: tdm.SPViT(layers or (1,)),
    "TDM": lambda rate, layers: tdm.TDM(rate, layers),
    "ToFu": lambda rate, layers: tdm.ToFu(round(rate * 3)),
    "ToMe": lambda rate, layers: tdm.ToMe(keep_rate=0.5 + rate / 2),
    "TopK": lambda rate, layers: tdm.TopK(high(rate), layers),
    "WardTDM": lambda rate, layers: tdm.WardTDM(rate, layers),
}
some_layers = st.sets(st.integers(0, DEPTH - 1), max_size=3).map(lambda found: tuple(sorted(found)))
rates = st.floats(0.05, 1)


def made(name, rate, layers):
    torch.manual_seed(1)
    pool = {"global_pool": "avg"} if name == "EvoViT" else {}
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": DEPTH, "num_heads": 2}
    vit = lively(VisionTransformer(num_classes=3, **shape, **pool).eval())
    model = tdm.attach(vit, STRATEGIES[name](rate, layers)).eval()
    with torch.no_grad():
        for parameter in model.strategy.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def pictures(seed, count=2):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def seeded(model, images):
    torch.manual_seed(3)  # for the one that draws
    return model.trace(images)


def test_all_of_them_are_here():
    whole = {
        one.__name__
        for path, one in tdm.Strategy.known().items()
        if path.startswith("tdm_lightning.") and one.__name__ in dir(tdm)
    }
    beside = {"SViTE", "Strategy", "Stack", "TokenReduction", "Distillation"}  # no method alone
    assert {name.partition(",")[0] for name in STRATEGIES} == whole - beside


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=4)
@given(rate=rates, layers=some_layers, seed=st.integers(0, 10**6))
@torch.no_grad()
def test_every_patch_is_accounted_for(name, rate, layers, seed):
    model = made(name, rate, layers)
    logits, trace = seeded(model, pictures(seed))
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert len(trace.token_counts) == DEPTH
    for layer in trace.layers:
        assert layer.assignment.shape == layer.role.shape == (2, PATCHES)
        assert layer.assignment.dtype == torch.int64
        assert torch.equal(layer.assignment < 0, layer.role == Role.DROPPED)
        assert (layer.assignment < PATCHES).all()
        left = trace.token_counts[layer.index]
        for image in range(2):
            held = set(layer.assignment[image].tolist()) - {-1}
            assert len(held) <= PATCHES
            there = left if isinstance(left, int) else int(left[image])
            beyond = {place for place in held if place >= there}
            assert not beyond or Role.PARKED in layer.role[image]
    gone = [(layer.assignment < 0) for layer in trace.layers]
    for before, later in itertools.pairwise(gone):
        assert (later | ~before).all(), "what was dropped does not come back"


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=4)
@given(rate=rates, layers=some_layers, seed=st.integers(0, 10**6))
@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch(name, rate, layers, seed):
    model, images = made(name, rate, layers), pictures(seed, 3)
    if name == "Random":  # which draws for the batch; the same for the first image alone
        images = images[:1]
    together, alone = seeded(model, images)[0], seeded(model, images[:1])[0]
    torch.testing.assert_close(together[:1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=4)
@given(
    rate=rates,
    layers=some_layers,
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    same=st.booleans(),
)
@torch.no_grad()
def test_half_precision_and_equal_tokens_stay_finite(name, rate, layers, dtype, same):
    model = made(name, rate, layers)
    if same:  # every patch is every other one
        model.vit.pos_embed.zero_()
    images = torch.zeros(2, 3, 32, 32) if same else pictures(5)
    logits, trace = seeded(model.to(dtype), images.to(dtype))
    assert logits.isfinite().all()
    assert logits.dtype == dtype
    for layer in trace.layers:
        assert torch.equal(layer.assignment < 0, layer.role == Role.DROPPED)


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=4)
@given(rate=rates, layers=some_layers, seed=st.integers(0, 10**6))
def test_gradients_are_finite(name, rate, layers, seed):
    model = made(name, rate, layers).train()
    torch.manual_seed(seed)
    output = model.run(pictures(seed))
    output.logits.square().mean().backward()
    found = [one.grad for one in model.parameters() if one.grad is not None]
    assert found
    assert all(one.isfinite().all() for one in found)
