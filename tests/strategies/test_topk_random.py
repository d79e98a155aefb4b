"""The two controls: keep the most attended tokens, or any."""

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning.core import Role


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64)


@pytest.fixture(scope="module")
def vit():
    return timm.create_model("test_vit", img_size=64).eval()  # 16 patches, 6 blocks


@torch.no_grad()
def test_topk_keeps_what_evit_keeps(vit, images):
    """In the first reducing layer, at a rate where both round to the same number."""
    _, ours = tdm.attach(vit, tdm.TopK(0.5, layers=(2,))).trace(images)
    _, evit = tdm.attach(vit, tdm.EViT(0.5, layers=(2,), fuse=False)).trace(images)
    assert torch.equal(ours.layers[0].assignment, evit.layers[0].assignment)
    assert torch.equal(ours.layers[0].role, evit.layers[0].role)


@torch.no_grad()
def test_topk_keeps_the_highest_importance(vit, images):
    _, trace = tdm.attach(vit, tdm.TopK(0.7, layers=(1, 3))).trace(images)
    first = trace.layers[0]
    kept = first.assignment >= 0
    lowest = first.importance.masked_fill(~kept, torch.inf).amin(1)
    assert (lowest >= first.importance.masked_fill(kept, 0).amax(1)).all()
    assert trace.token_counts == [16, 11, 11, 7, 7, 7]


@torch.no_grad()
def test_random_repeats_itself_at_inference_only(vit, images):
    model = tdm.attach(vit, tdm.Random(0.5, layers=(1, 3)))
    assert torch.equal(model(images), model(images))
    model.strategy.train()
    kept = [model.trace(images)[1].layers[0].role == Role.KEPT for _ in range(2)]
    assert not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0][0], kept[0][1])
    assert kept[0].sum(1).tolist() == [8, 8, 8]


@torch.no_grad()
def test_random_seeds_and_layers_differ(vit, images):
    def kept(seed):
        _, trace = tdm.attach(vit, tdm.Random(0.5, layers=(1, 3), seed=seed)).trace(images)
        return trace.layers[0].role[0] == Role.KEPT

    choices = torch.stack([kept(seed) for seed in range(40)])
    assert len({tuple(choice.tolist()) for choice in choices}) > 35
    share = choices.float().mean(0)
    assert share.min() > 0.2  # no position is favoured
    assert share.max() < 0.8


def test_multiply_accumulates():
    vit = timm.create_model("deit_tiny_patch16_224")
    for strategy in (tdm.TopK(0.7), tdm.Random(0.7)):
        assert tdm.flops.count_macs(tdm.attach(vit, strategy)) == 807_606_912


@pytest.mark.parametrize("make", [tdm.TopK, tdm.Random, tdm.DPCKNN, tdm.DyViT])
def test_a_schedule_that_leaves_no_token_is_refused(vit, make):
    with pytest.raises(ValueError, match=r"keep_rate=0.2 leaves no token at layer 3.*raise"):
        tdm.attach(vit, make(0.2, layers=(1, 3)))
    tdm.attach(vit, make(0.25, layers=(1, 3)))


@pytest.mark.parametrize("make", [tdm.TopK, tdm.Random, tdm.DPCKNN, tdm.DyViT])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep_rate": 0}, ValueError, "keep_rate"),
        ({"keep_rate": float("nan")}, ValueError, "keep_rate"),
        ({"keep_rate": "0.7"}, TypeError, "keep_rate"),
        ({"layers": (3, 3)}, ValueError, "repeat"),
        ({"layers": (-1,)}, ValueError, "negative"),
        ({"layers": (99,)}, ValueError, "do not exist"),
    ],
)
def test_bad_arguments(vit, make, arguments, error, message):
    with pytest.raises(error, match=message):
        tdm.attach(vit, make(**arguments))


@pytest.mark.parametrize("make", [tdm.TopK, tdm.Random, tdm.DPCKNN])
def test_takes_a_merger_that_needs_no_more_than_there_is(vit, make):
    merger = tdm.Cluster()
    model = tdm.attach(vit, make(0.7, layers=(1, 3), merger=merger)).eval()
    plain = tdm.attach(vit, make(0.7, layers=(1, 3))).eval()
    images = torch.randn(1, *tdm.flops.default_input_size(vit))
    (_, merged), (_, alone) = model.trace(images), plain.trace(images)
    assert merged.token_counts == alone.token_counts
    assert Role.DROPPED not in merged.layers[0].role


def test_bad_seed():
    with pytest.raises(ValueError, match="seed"):
        tdm.Random(seed=-1)


@pytest.mark.parametrize("make", [tdm.TopK, tdm.Random, tdm.DPCKNN, tdm.DyViT])
def test_a_budget_is_met_by_the_largest_rate_that_fits(vit, make):
    budget = 0.6 * tdm.flops.count_macs(vit) / 1e9
    rate = tdm.solve_keep_rate(vit, make(layers=(1, 3)), budget)
    costs = [
        tdm.flops.count_macs(tdm.attach(vit, make(value, layers=(1, 3)))) / 1e9
        for value in (rate, rate + 1e-3)
    ]
    assert costs[0] <= budget < costs[1]
    with pytest.raises(ValueError, match=f"{make.__name__} cannot meet 1e-06 GMACs"):
        tdm.solve_keep_rate(vit, make(layers=(1, 3)), 1e-6)
