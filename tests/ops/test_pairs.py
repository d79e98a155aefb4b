"""Pair matching against plain loops, and on pairs that are known."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning.ops import match_pairs, share_group

RULES = ("bipartite", "greedy")


def similarity_by_loops(x):
    unit = [row / np.linalg.norm(row) for row in x]
    return [[float(sum(p * q for p, q in zip(a, b, strict=True))) for b in unit] for a in unit]


def fusions_by_loops(x, pairs, rule):
    """Which token is fused into which, ``{token: into}``."""
    s = similarity_by_loops(x)
    n = len(s)
    if rule == "bipartite":
        edges = []
        for a in range(0, n, 2):
            partner = max(range(1, n, 2), key=lambda b: s[a][b])
            edges.append((s[a][partner], a, partner))
        edges.sort(key=lambda edge: -edge[0])
        return {a: b for _, a, b in edges[:pairs]}
    free, fused = set(range(n)), {}
    while len(fused) < pairs:
        _, i, j = max((s[i][j], i, j) for i in free for j in free if i < j)
        fused[j] = i
        free -= {i, j}
    return fused


def groups_by_loops(x, pairs, rule):
    fused = fusions_by_loops(x, pairs, rule)
    survivors = [i for i in range(len(x)) if i not in fused]
    group = [survivors.index(fused.get(i, i)) for i in range(len(x))]
    return group


@pytest.mark.parametrize("rule", RULES)
@given(n=st.integers(2, 24), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_equals_the_loops(rule, n, share, seed):
    pairs = int(share * (n // 2))
    x = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed))
    group = match_pairs(x, pairs, rule)
    for image in range(2):
        wanted = groups_by_loops(x[image].double().numpy(), pairs, rule)
        assert group[image].tolist() == wanted


@pytest.mark.parametrize("rule", RULES)
@given(seed=st.integers(0, 10**6), pairs=st.integers(1, 6))
def test_known_pairs_are_recovered(rule, seed, pairs):
    """Twins stand at neighbouring ranks, one in each half of the bipartite split; the other tokens
    are orthogonal.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.eye(16)[torch.randperm(16, generator=generator)]
    twins, lonely = directions[:pairs].repeat_interleave(2, dim=0), directions[pairs : pairs + 6]
    x = torch.cat((twins, lonely)) * torch.rand(2 * pairs + 6, 1, generator=generator).add(0.5)
    x = x + 1e-3 * torch.randn(x.shape, generator=generator)
    found = match_pairs(x.unsqueeze(0), pairs, rule)
    group, shared = found[0].tolist(), share_group(found)[0].tolist()
    assert all(group[2 * p] == group[2 * p + 1] for p in range(pairs))
    assert shared == [True] * (2 * pairs) + [False] * 6
    assert len(set(group)) == pairs + 6


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("n", "pairs"), [(1, 0), (2, 0), (2, 1), (3, 1), (9, 4), (138, 15), (138, 69)]
)
def test_exactly_n_minus_p_groups(rule, n, pairs):
    group = match_pairs(torch.randn(2, n, 8), pairs, rule)
    shared = share_group(group)
    for image in range(2):
        labels = group[image].tolist()
        assert sorted(set(labels)) == list(range(n - pairs))
        assert shared[image].tolist() == [labels.count(label) > 1 for label in labels]


def test_the_greedy_rule_never_fuses_three():
    x = torch.ones(1, 8, 4) + 0.01 * torch.randn(1, 8, 4)
    group = match_pairs(x, 4, "greedy")
    assert group[0].bincount().tolist() == [2, 2, 2, 2]


def test_bipartite_may_fuse_several_into_one():
    x = torch.tensor(
        [[[1.0, 0.0], [1.0, 0.1], [1.0, -0.1], [0.0, 1.0]]]
    )  # ranks 0 and 2 both prefer rank 1
    group = match_pairs(x, 2)
    assert group.tolist() == [[0, 0, 0, 1]]
    assert share_group(group).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("rule", RULES)
def test_ties_and_zero_tokens_keep_the_count(rule):
    for x in (torch.ones(1, 8, 4), torch.zeros(1, 8, 4)):
        group = match_pairs(x, 3, rule)
        assert sorted(set(group[0].tolist())) == list(range(5))


@pytest.mark.parametrize("rule", RULES)
def test_length_does_not_matter(rule):
    x = torch.randn(1, 12, 6)
    scaled = x * (torch.rand(1, 12, 1) * 10 + 0.1)
    assert torch.equal(match_pairs(x, 4, rule), match_pairs(scaled, 4, rule))
