"""PiToMe: against the official code, and with plain loops."""

import math

import pytest
import torch
from torch.nn import functional as F

import tdm_lightning as tdm
from tdm_lightning.ops import match_by_energy
from tests.helpers.peers import check_against_official, same_groups
from tests.helpers.vits import lively

CASES = ("pitome_a", "pitome_b", "pitome_c")


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", CASES)
def test_official_numbers(official, golden, case):
    rate = golden(case)[0]["method"]["keep_rate"]
    check_against_official(official(case, tdm.PiToMe(rate)))


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_proportional_attention_changes_the_official_case(official, golden, case):
    rate = golden(case)[0]["method"]["keep_rate"]
    _, tensors, model = official(case, tdm.PiToMe(rate, proportional_attention=True))
    assert (model(tensors["input"]) - tensors["logits"]).abs().amax(1).min() > 1e-3


def plain_groups(features, pairs, margin, among):
    """The token that takes each one in, with loops."""
    unit, n = F.normalize(features, dim=-1), len(features)

    def energy(i):
        differences = [(unit[i] @ unit[j]).item() - margin for j in range(n)]
        return sum(d if d > 0 else math.expm1(d) for d in differences) / n

    order = sorted(range(n), key=lambda i: -energy(i))[:among]
    proposals = []
    for source in order[::2]:
        target = max(order[1::2], key=lambda j: (unit[source] @ unit[j]).item())
        proposals.append(((unit[source] @ unit[target]).item(), source, target))
    into = list(range(n))
    for _, source, target in sorted(proposals, reverse=True)[:pairs]:
        into[source] = target
    return into


@pytest.mark.parametrize(("n", "pairs", "among"), [(9, 3, 9), (9, 3, 6), (2, 1, 2), (7, 1, 7)])
@pytest.mark.parametrize("margin", [0.75, 0.0])
def test_matching_against_plain_loops(n, pairs, among, margin):
    features = torch.randn(3, n, 6)
    group = match_by_energy(features, pairs, margin, among)
    expected = torch.tensor([plain_groups(image, pairs, margin, among) for image in features])
    assert same_groups(group, expected)
    assert group.max() == n - pairs - 1


def test_meets_a_budget():
    vit = lively(small())
    half = tdm.flops.count_macs(tdm.attach(vit, tdm.Strategy())) / 2e9
    solved = tdm.solve_keep_rate(vit, tdm.PiToMe(), half)
    assert 0.5 < solved < 1


def test_more_than_half_a_block_is_refused():
    with pytest.raises(ValueError, match="leaves at least 32 of 64 tokens"):
        tdm.attach(small(), tdm.PiToMe(0.4))


def small():
    import timm

    return timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, num_heads=2, depth=4
    )
