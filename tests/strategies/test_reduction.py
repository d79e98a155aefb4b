"""Importance × schedule × merger: any three make a method; the published ones are such three."""

import json

import pytest
import timm
import torch

import tdm_lightning as tdm
from tests.helpers.vits import lively


def vit(**changes):
    torch.manual_seed(0)
    return lively(timm.create_model("test_vit", img_size=64, **changes)).eval()


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
ATTENTION, LAYERS = tdm.ClassAttention(), (1, 3)
TRIPLES = {
    "TDM": (tdm.TDM(0.7, LAYERS), (ATTENTION, tdm.RateAtBlocks(0.7, LAYERS), tdm.TokenMerger())),
    "EViT": (tdm.EViT(0.7, LAYERS), (ATTENTION, tdm.RateAtBlocks(0.7, LAYERS), tdm.Fuse())),
    "EViT, dropping": (
        tdm.EViT(0.7, LAYERS, fuse=False),
        (ATTENTION, tdm.RateAtBlocks(0.7, LAYERS), tdm.Drop()),
    ),
    "TopK": (
        tdm.TopK(0.7, LAYERS),
        (ATTENTION, tdm.RateAtBlocks(0.7, LAYERS, "initial"), tdm.Drop()),
    ),
    "Random": (
        tdm.Random(0.7, LAYERS, 3),
        (tdm.Chance(3), tdm.RateAtBlocks(0.7, LAYERS, "initial"), tdm.Drop()),
    ),
    "ToMe": (tdm.ToMe(2), (None, tdm.FewerPerBlock(2), tdm.PairMerger())),
    "DPC-KNN": (
        tdm.DPCKNN(0.7, LAYERS),
        (None, tdm.RateAtBlocks(0.7, LAYERS, "initial"), tdm.Cluster(), True),
    ),
}


@pytest.mark.parametrize("name", TRIPLES)
@torch.no_grad()
def test_published_methods_are_triples(name):
    named, triple = TRIPLES[name]
    one, other = tdm.attach(vit(), named), tdm.attach(vit(), tdm.TokenReduction(*triple))
    (logits, trace), (again, same) = one.trace(IMAGES), other.trace(IMAGES)
    assert torch.equal(logits, again)
    for mine, theirs in zip(trace.layers, same.layers, strict=True):
        assert torch.equal(mine.assignment, theirs.assignment)
        assert torch.equal(mine.role, theirs.role)


@pytest.mark.parametrize("name", TRIPLES)
def test_triples_are_plain_values(name):
    strategy = tdm.TokenReduction(*TRIPLES[name][1])
    config = json.loads(json.dumps(strategy.config()))
    assert tdm.Strategy.from_config(config).config() == config
    assert config["class_path"] == "tdm_lightning.TokenReduction"


@torch.no_grad()
def test_one_part_can_be_exchanged():
    """ToMe's merger at a constant rate in every block; EViT's schedule by received attention."""
    constant = tdm.TokenReduction(None, tdm.RateAtBlocks(0.8, "all"), tdm.PairMerger())
    counts = tdm.attach(vit(), constant).trace(IMAGES)[1].token_counts
    assert counts == [13, 11, 9, 8, 7, 6]
    received = tdm.TokenReduction(tdm.ReceivedAttention(), tdm.RateAtBlocks(0.5, (2,)))
    own = tdm.TokenReduction(None, tdm.RateAtBlocks(0.5, (2,)))
    one, other = (tdm.attach(vit(), each).trace(IMAGES)[1] for each in (received, own))
    assert one.token_counts == other.token_counts == [16, 16, 8, 8, 8, 8]
    assert not torch.equal(one.layers[0].importance, other.layers[0].importance)
    plain = vit(class_token=False, global_pool="avg")
    same = [tdm.attach(plain, each).trace(IMAGES)[1].layers[0] for each in (received, own)]
    assert torch.equal(same[0].importance, same[1].importance)


def test_a_list_of_counts():
    schedule = tdm.CountPerBlock([16, 12, 12, 5, 5, 4])
    strategy = tdm.TokenReduction(None, schedule, tdm.TokenMerger())
    strategy = tdm.TokenReduction(ATTENTION, schedule, tdm.TokenMerger())
    assert tdm.attach(vit(), strategy).trace(IMAGES)[1].token_counts == [16, 12, 12, 5, 5, 4]
    with pytest.raises(ValueError, match="one number per block, 6 here, got 2"):
        tdm.attach(vit(), tdm.TokenReduction(ATTENTION, tdm.CountPerBlock([8, 4])))
    with pytest.raises(ValueError, match=r"must not grow.*block 1 has 9 after 8"):
        tdm.CountPerBlock([8, 9])
    with pytest.raises(ValueError, match="smaller than 1"):
        tdm.CountPerBlock([8, 0])


def test_parts_of_the_wrong_kind():
    with pytest.raises(TypeError, match="importance must be of class Importance, got 'class'"):
        tdm.TokenReduction("class")
    with pytest.raises(TypeError, match=r"schedule must be of class Schedule, got 0.7"):
        tdm.TokenReduction(None, 0.7)
    with pytest.raises(ValueError, match="before a block there is no attention to see"):
        tdm.TokenReduction(ATTENTION, None, tdm.Cluster(), before=True)
    with pytest.raises(ValueError, match="goes by importance, and there is none"):
        tdm.attach(vit(), tdm.TokenReduction(None, None, tdm.TokenMerger()))


def test_own_parts_are_used():
    class Norm(tdm.Importance):
        def __call__(self, seen, index, training):
            return seen.x.norm(dim=-1)

    class Once(tdm.Schedule):
        def __init__(self, keep: int = 5):
            self.keep_tokens = self.keep_ = keep

        def reduces(self, index, depth):
            return index == depth - 1

        def keep(self, index, count, info, rate=None):
            return self.keep_ if index == info.depth - 1 else count

    model = tdm.attach(vit(), tdm.TokenReduction(Norm(), Once(5), tdm.Drop()))
    assert model.trace(IMAGES)[1].token_counts == [16] * 5 + [5]


def test_keep_rates_are_annealed_and_solved_whatever_the_parts():
    strategy = tdm.TokenReduction(ATTENTION, tdm.RateAtBlocks(0.5, LAYERS), tdm.TokenMerger())
    model = tdm.attach(vit(), strategy)
    strategy.current_keep_rate = 0.75
    assert model.trace(IMAGES)[1].token_counts == [16, 12, 12, 9, 9, 9]
    strategy.current_keep_rate = None
    budget = 0.7 * tdm.flops.count_macs(vit()) / 1e9
    from tdm_lightning.budget import at_budget

    solved = at_budget(vit(), strategy, budget)
    assert solved.merger.config() == strategy.merger.config()
    assert tdm.flops.count_macs(tdm.attach(vit(), solved)) <= budget * 1e9
