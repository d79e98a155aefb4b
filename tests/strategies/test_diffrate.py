"""DiffRate: against the official code, its published numbers, and with plain loops."""

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning.core import Role, Seen
from tests.helpers.peers import check_against_official

CASES = ("diffrate_a", "diffrate_b", "diffrate_c")


def settings(golden, case):
    method = golden(case)[0]["method"]
    return method["counts"], method["pruned"]


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", CASES)
def test_official_numbers(official, golden, case):
    check_against_official(official(case, tdm.DiffRate(*settings(golden, case))))


@torch.no_grad()
def test_what_is_dropped_matters_in_the_official_case(official, golden):
    counts, _ = settings(golden, "diffrate_b")
    _, tensors, model = official("diffrate_b", tdm.DiffRate(counts))
    assert (model(tensors["input"]) - tensors["logits"]).abs().amax(1).min() > 1e-3


def test_published_numbers():
    vit = timm.create_model("deit_small_patch16_224", embed_dim=48, num_heads=3)
    model = tdm.attach(vit.eval(), tdm.DiffRate("deit_small-2.3"))
    _, trace = model.trace(torch.randn(1, 3, 224, 224))
    assert trace.token_counts == [196, 179, 155, 126, 108, 97, 79, 65, 51, 36, 30, 2]
    drops = [model.strategy.merger_in(index, model._info).drop for index in range(12)]
    assert drops == [0, 5, 12, 13, 6, 4, 6, 6, 4, 7, 4, 28]
    for name in ("deit_tiny-0.6", "mae_huge-124.5"):
        tdm.DiffRate(name)


def test_a_budget_is_met_by_a_power_of_published_shares():
    vit = timm.create_model(
        "deit_tiny_patch16_224", img_size=64, patch_size=4, embed_dim=32, num_heads=2
    )
    half = tdm.flops.count_macs(tdm.attach(vit, tdm.Strategy())) * 0.3
    solved = tdm.budget.at_budget(vit, tdm.DiffRate(), half / 1e9)
    assert solved.power > 1
    assert tdm.flops.macs_with(vit, solved) == pytest.approx(half, rel=0.02)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: tdm.DiffRate("deit_small-9"), "no numbers 'deit_small-9'"),
        (lambda: tdm.DiffRate([9, 8], [9]), "as many numbers as counts, 2, got 1"),
        (lambda: tdm.DiffRate([8, 9]), "must not grow"),
        (lambda: tdm.DiffRate("deit_small-2.9", [9]), "leave pruned out"),
        (lambda: tdm.DiffRate([9, 8], power=2), "power"),
        (lambda: tdm.SharePerBlock([0.5, 0.6]), "must not grow"),
        (lambda: tdm.RankMerger(5).check(8, 4), "drop at most 4"),
    ],
)
def test_bad_arguments(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("strategy", [tdm.DiffRate(), tdm.DiffRate([60, 50])])
def test_numbers_for_another_depth_are_refused(strategy):
    vit = timm.create_model("deit_tiny_patch16_224", img_size=32, patch_size=4, depth=4)
    with pytest.raises(ValueError, match="one number per block, 4 here, got (12|2)"):
        tdm.attach(vit, strategy)


@pytest.mark.parametrize("drop", [0, 2])
def test_merging_against_plain_loops(drop):
    x, importance = torch.randn(2, 9, 4), torch.rand(2, 9)
    size = torch.randint(1, 5, (2, 9)).float()
    found = tdm.RankMerger(drop)(Seen(x, size, importance), 4)
    for image in range(2):
        order = sorted(range(9), key=lambda i: -importance[image, i].item())
        groups = {k: [k] for k in order[:4]}
        total = {k: size[image, k].item() for k in order[:4]}
        for i in order[4 : 9 - drop]:
            cosines = {
                k: torch.cosine_similarity(x[image, i], x[image, k], dim=0).item() for k in groups
            }
            k = max(cosines, key=cosines.get)
            groups[k].append(i)
            total[k] += size[image, i].item() * cosines[k]
        for place, k in enumerate(order[:4]):
            torch.testing.assert_close(found.x[image, place], x[image, groups[k]].mean(0))
            assert found.size[image, place].item() == pytest.approx(max(total[k], 1e-2), abs=1e-5)
            assert (found.assignment[image, groups[k]] == place).all()
        for i in order[9 - drop :]:
            assert found.assignment[image, i] == -1
            assert found.role[image, i] == Role.DROPPED
