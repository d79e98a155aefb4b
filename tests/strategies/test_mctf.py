"""MCTF: against the official code, and with plain loops."""

import pytest
import timm
import torch

import tdm_lightning as tdm
from tdm_lightning.core import Seen
from tdm_lightning.ops import match_both_ways
from tests.helpers.peers import check_against_official, same_groups

CASES = ("mctf_a", "mctf_b", "mctf_c")


def strategy(golden, case, **changed):
    method = golden(case)[0]["method"]
    r, layers = method["r"], method["layers"]
    own = {"r": r} if isinstance(r, int) else {"keep_rate": 1 - r}
    return tdm.MCTF(**{**own, "layers": layers, **changed})


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("case", CASES)
def test_official_numbers(official, golden, case):
    check_against_official(official(case, strategy(golden, case)))


@pytest.mark.parametrize("temperatures", [(1, 1e9, 40), (1, 20, 1e9), (0.1, 20, 40)])
@torch.no_grad()
def test_every_criterion_decides_in_the_official_case(official, golden, temperatures):
    changed = strategy(golden, "mctf_c", temperatures=temperatures)
    _, tensors, model = official("mctf_c", changed)
    assert (model(tensors["input"]) - tensors["logits"]).abs().max() > 1e-3


def plain_groups(x, importance, size, pairs, prefix, temperatures):
    """Who took each one in, with loops."""
    n = len(x)
    weak_a, weak_s = 1 / importance, 1 / size
    weak_a, weak_s = weak_a / weak_a.max(), weak_s / weak_s.max()

    def attraction(i, j):
        cosine = torch.cosine_similarity(x[i], x[j], dim=0)
        one, two, three = temperatures
        return (
            ((cosine + 1) / 2) ** (1 / one)
            * (weak_a[i] * weak_a[j]) ** (1 / two)
            * (weak_s[i] * weak_s[j]) ** (1 / three)
        ).item()

    even = [i for i in range(n) if (i + prefix) % 2 == 0]
    odd = [i for i in range(n) if (i + prefix) % 2 == 1]
    into = list(range(n))

    def accept(sources, targets, count):
        proposals = [
            max((attraction(source, target), -target, source) for target in targets)
            for source in sources
        ]
        for _, target, source in sorted(proposals, reverse=True)[:count]:
            into[source] = -target

    accept(even, odd, pairs // 2)
    accept(odd, [i for i in even if into[i] == i], pairs - pairs // 2)
    return [into[into[i]] for i in range(n)]


@pytest.mark.parametrize(("n", "pairs"), [(9, 4), (10, 3), (2, 1), (7, 1)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_matching_against_plain_loops(n, pairs, prefix):
    x, importance = torch.randn(3, n, 5), torch.rand(3, n) + 0.1
    size, temperatures = torch.randint(1, 4, (3, n)).float(), (1.0, 2.0, 3.0)
    group = match_both_ways(x, importance, size, pairs, prefix, temperatures)
    expected = torch.tensor(
        [plain_groups(x[b], importance[b], size[b], pairs, prefix, temperatures) for b in range(3)]
    )
    assert same_groups(group, expected)
    assert group.max() == n - pairs - 1


def test_tokens_become_means_by_importance_and_size():
    x, importance, size = torch.randn(1, 6, 4), torch.rand(1, 6), torch.rand(1, 6) + 1
    found = tdm.CriteriaMerger()(Seen(x, size, importance), 4)
    for number in range(4):
        members = found.assignment[0] == number
        weight = (importance * size)[0, members]
        expected = (weight.unsqueeze(1) * x[0, members]).sum(0) / weight.sum()
        torch.testing.assert_close(found.x[0, number], expected)
        torch.testing.assert_close(found.size[0, number], size[0, members].sum())


def test_ten_tokens_stay():
    vit = timm.create_model("deit_tiny_patch16_224", img_size=24, patch_size=4, depth=3).eval()
    _, trace = tdm.attach(vit, tdm.MCTF(16)).trace(torch.randn(1, 3, 24, 24))
    assert trace.token_counts == [36, 20, 10]
    _, trace = tdm.attach(vit, tdm.MCTF([30, 30, 30])).trace(torch.randn(1, 3, 24, 24))
    assert trace.token_counts == [18, 9, 9]


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: tdm.MCTF(8, keep_rate=0.9), ValueError, "two schedules"),
        (lambda: tdm.MCTF(temperatures=(1, 2)), ValueError, "temperatures are of"),
        (lambda: tdm.MCTF(temperatures=(1, 2, 0)), ValueError, "above"),
        (
            lambda: tdm.attach(timm.create_model("vit_relpos_small_patch16_224"), tdm.MCTF()),
            TypeError,
            "attention map",
        ),
    ],
)
def test_what_cannot_be_done_is_said(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("share", [0.7, 0.4])
def test_meets_a_budget(share):
    vit = timm.create_model(
        "deit_tiny_patch16_224", img_size=56, patch_size=4, embed_dim=32, num_heads=2, depth=6
    )
    budget = share * tdm.flops.macs_with(vit, tdm.Strategy()) / 1e9
    solved = tdm.budget.at_budget(vit, tdm.MCTF(), budget)
    assert solved.r[0] == 0
    assert 0.99 * budget <= tdm.flops.macs_with(vit, solved) / 1e9 <= budget
