"""TDM's plan in Triton against the parts that the merger puts together."""

import pytest
import torch
from torch import Tensor

from tdm_lightning.mergers.token_merger import split_budget
from tdm_lightning.ops import (
    cluster_density_peaks,
    gather_tokens,
    inverse_order,
    match_pairs,
    rank_order,
)
from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tests.helpers.plans import COUNTS, TYPES, check_operator, is_grouping, patches

pytest.importorskip("triton")
from tdm_lightning.ops.kernels.decouple import decouple

# NumPy, in the interpreter, warns of logarithms of zero and of what is masked.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def in_torch(x, score, attentive, pairs, clusters):
    order = rank_order(score)
    ranked, parts = gather_tokens(x, order), []
    if attentive:
        parts.append(match_pairs(ranked[:, :attentive], pairs, "bipartite"))
    if clusters:
        label, _ = cluster_density_peaks(ranked[:, attentive:], clusters, "gaussian")
        parts.append(label + attentive - pairs)
    return torch.cat(parts, dim=1).gather(1, inverse_order(order))


def splits(n):
    """Budgets as TDM makes them, and of few tokens the ends of what can be."""
    if n < 100:
        yield n, n // 3, 0
        yield 0, 0, max(n // 4, 1)
        yield n - 1, (n - 1) // 2, 1
    for keep in {max(int(share * n), 1) for share in (0.3, 0.7)} - {n}:
        split = split_budget(n, keep)
        yield split.attentive, split.pairs, split.clusters


@pytest.mark.parametrize(
    ("dtype", "counts"), [(torch.float32, COUNTS), *((half, (7, 65)) for half in TYPES[1:])]
)
def test_groups(dtype, counts):
    for n in counts:
        for number, split in enumerate(splits(n)):
            batch = 1 + 2 * (number % 2)
            x, score = patches(batch, n, 24, dtype), torch.randn(batch, n)
            assert torch.equal(decouple(x, score, *split), in_torch(x, score, *split)), (n, split)


def test_the_most_tokens():
    x, score = patches(1, 1369, 24), torch.randn(1, 1369)
    split = split_budget(1369, 958)
    split = split.attentive, split.pairs, split.clusters
    assert torch.equal(decouple(x, score, *split), in_torch(x, score, *split))


def test_tokens_far_from_the_origin():
    """Their distances are small beside their lengths; the form that centres them loses little."""
    x, score = patches(2, 50, 24) + 100, torch.randn(2, 50)
    assert torch.equal(decouple(x, score, 0, 0, 12), in_torch(x, score, 0, 0, 12))


def test_tokens_so_far_apart_that_densities_vanish():
    x, score = patches(2, 50, 24) * 40, torch.randn(2, 50)
    assert torch.equal(decouple(x, score, 20, 5, 9), in_torch(x, score, 20, 5, 9))


def test_ties_go_to_the_first():
    # equal tokens: rank is place; 0 and 2 go into 1, the first that stays; 6 and 7 are centers
    found = decouple(torch.ones(2, 10, 4), torch.ones(2, 10), 6, 2, 2)
    assert found.tolist() == [[0, 0, 0, 1, 2, 3, 4, 5, 4, 4]] * 2


def test_ties_and_numbers_that_are_none_still_give_groups():
    x, score = torch.eye(3)[torch.randint(0, 3, (4, 300))], torch.randint(0, 3, (4, 300)).float()
    x[1, 5], x[2], score[3, 7] = torch.nan, 0, torch.nan
    group = decouple(x, score, 150, 60, 40)
    assert is_grouping(group, 130)
    assert torch.equal(group, decouple(x, score, 150, 60, 40))


@in_two_forms("tdm_lightning.ops.kernels.decouple:decouple", lambda *args: None)
def tried_decouple(x: Tensor, score: Tensor, attentive: int, pairs: int, clusters: int) -> Tensor:
    return in_torch(x, score, attentive, pairs, clusters)


def test_it_is_an_operator():
    check_operator(tried_decouple, patches(2, 12, 8), torch.randn(2, 12), 8, 2, 2)
