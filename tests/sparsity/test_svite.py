"""SViTE: its pure pieces, the masks at first, and its settings."""

import copy
import math

import pytest
import timm
import torch
from timm.layers import SwiGLU

import tdm_lightning as tdm
from tdm_lightning import sparsity
from tdm_lightning.sparsity import Structured, Unstructured
from tests.helpers.svites import DEPTH, KINDS, fresh, masks, small, train

# Pure pieces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.05, 0.4, 0.5, 0.95, 1.0])
def test_erk_keeps_the_overall_density(density):
    shapes = [
        tuple(p.shape) for p in timm.create_model("test_vit").parameters() if p.ndim in (2, 4)
    ]
    sizes, shares = [math.prod(shape) for shape in shapes], sparsity.erk_densities(shapes, density)
    assert all(0 < share <= 1 for share in shares)
    assert sum(n * share for n, share in zip(sizes, shares, strict=True)) == pytest.approx(
        density * sum(sizes)
    )
    scaled = {
        round(share * n / sum(shape), 9)
        for n, shape, share in zip(sizes, shapes, shares, strict=True)
        if share < 1
    }
    assert len(scaled) <= 1  # one ε for all layers that are not full


def test_the_death_rate_is_a_cosine():
    assert sparsity.death_rate(0, 600) == 0.5
    assert sparsity.death_rate(150, 600) == pytest.approx(
        0.005 + 0.495 * (1 + math.cos(math.pi / 4)) / 2
    )
    assert sparsity.death_rate(600, 600) == pytest.approx(0.005)


def test_exchange_by_hand():
    active = torch.tensor([1, 1, 1, 0, 0]).bool()
    worth, promise = (
        torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0]),
        torch.tensor([0.0, 8.0, 0.0, 4.0, 5.0]),
    )
    assert sparsity.exchange(active, worth, promise, rate=0.3).tolist() == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert (
        sparsity.exchange(active, worth, promise, rate=0.3, readmit=True).tolist()
        == active.tolist()
    )
    # At most as many leave as there are others.
    assert sparsity.exchange(active, worth, promise, rate=1.0).tolist() == [
        True,
        False,
        False,
        True,
        True,
    ]
    assert sparsity.exchange(torch.ones(5).bool(), worth, promise, rate=0.5).all()


def test_exchange_after_an_overflow():
    active = torch.tensor([1, 1, 0, 0]).bool()
    promise = torch.tensor([0.0, 0.0, torch.nan, 1.0])
    assert sparsity.exchange(
        active, torch.tensor([torch.inf, 1.0, 0, 0]), promise, 0.5
    ).tolist() == [False, True, False, True]


# Masks at first -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "heads", "units", "parameters", "macs"),
    [
        ("tiny", 0.7, 0.7, 4_210_600, 868_180_992),
        ("small", 0.7, 0.6, 14_613_352, 2_898_315_264),
        ("base", 0.7, 0.6, 56_836_840, 11_003_633_664),
    ],
)
def test_published_sizes(name, heads, units, parameters, macs):
    model = tdm.attach(
        timm.create_model(f"deit_{name}_patch16_224"), tdm.SViTE(Structured(heads, units))
    )
    assert sparsity.active_parameters(model) == parameters
    assert tdm.flops.count_macs(model) == macs


def test_attaching_changes_no_weight_and_training_starts_sparse():
    model = small(tdm.SViTE())
    before = copy.deepcopy(model.vit.state_dict())
    plain = tdm.detach(model).eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model.eval()(x), plain(x))
    assert all(torch.equal(value, before[name]) for name, value in model.vit.state_dict().items())
    assert not model.strategy.masks.in_force
    model.objective.on_progress(0, 0, 100)
    assert model.strategy.masks.in_force
    assert model.strategy.masks.enforced(model.vit)
    assert (model.vit.blocks[0].attn.qkv.weight == 0).any(dim=1).sum() == 3 * 8


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_sizes_of_the_first_masks(kind):
    model = small(tdm.SViTE(fresh(kind)))
    found = masks(model)
    if isinstance(kind, Structured):
        counts = {name: int(mask.sum()) for name, mask in found.items()}
        assert counts == {f"heads_{i}": 2 for i in range(DEPTH)} | {
            f"units_{i}": int(96 * 0.6) for i in range(DEPTH)
        }
    else:
        weights = [p for p in model.vit.parameters() if p.ndim in (2, 4)]
        assert [tuple(mask.shape) for mask in found.values()] == [tuple(p.shape) for p in weights]
        total = sum(p.numel() for p in weights)
        assert sum(int(mask.sum()) for mask in found.values()) == pytest.approx(
            0.4 * total, abs=len(weights)
        )
        assert sparsity.active_parameters(model) == sum(
            p.numel() for p in model.vit.parameters()
        ) - sum(int((~mask).sum()) for mask in found.values())
    other, same = masks(small(tdm.SViTE(fresh(kind), seed=1))), masks(small(tdm.SViTE(fresh(kind))))
    assert any(not torch.equal(mask, other[name]) for name, mask in found.items())
    assert all(torch.equal(mask, same[name]) for name, mask in found.items())


# Settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: small(tdm.SViTE(Structured(heads=0.3))),
            ValueError,
            "heads=0.3 of 3 leaves no head.*at least 0.333",
        ),
        (
            lambda: small(tdm.SViTE(Structured(units=0.01))),
            ValueError,
            "units=0.01 of 96 leaves no unit",
        ),
        (lambda: Structured(heads=0), ValueError, "heads must lie in"),
        (lambda: Structured(units=1.5), ValueError, "units must lie in"),
        (lambda: Unstructured("0.4"), TypeError, "density must be a number"),
        (lambda: tdm.SViTE(masks=0.7), TypeError, r"masks must be Structured\(…\)"),
        (lambda: tdm.SViTE(interval=0), ValueError, "interval must be at least 1"),
        (lambda: tdm.SViTE(until=0), ValueError, "until must lie in"),
        (lambda: tdm.SViTE(death_rate=2), ValueError, "death_rate must lie in"),
        (lambda: tdm.SViTE(seed=-1), ValueError, "seed must be at least 0"),
        (
            lambda: small(tdm.SViTE(), scale_attn_norm=True),
            TypeError,
            "timm's plain Attention and Mlp",
        ),
        (lambda: small(tdm.SViTE(), mlp_layer=SwiGLU), TypeError, "holds Attention and SwiGLU"),
    ],
)
def test_bad_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_masks_belong_to_one_model():
    strategy = tdm.SViTE()
    small(strategy)
    with pytest.raises(ValueError, match="attached already and owns masks"):
        small(strategy)


def test_full_density_is_the_plain_model():
    model = small(tdm.SViTE(Structured(1.0, 1.0), interval=1))
    train(model, 3)
    assert all(mask.all() for mask in masks(model).values())
    assert tdm.flops.count_macs(model) == tdm.flops.count_macs(model.vit)


@pytest.mark.parametrize("classes", [7, 0])
def test_another_classifier(classes):
    model = small(tdm.SViTE(Unstructured(0.4)))
    kept = masks(model)
    model.reset_classifier(classes)
    sparsity.apply_masks(model)
    found = masks(model)
    assert ("head-weight" in found) == bool(classes)
    assert all(
        torch.equal(mask, kept[name]) for name, mask in found.items() if name != "head-weight"
    )
