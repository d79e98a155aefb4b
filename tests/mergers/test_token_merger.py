"""The token merger: its budget, its groups, and what they are worth on real features."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_sample_image

from tdm_lightning import TokenMerger
from tdm_lightning.core import Role, Seen
from tdm_lightning.mergers.token_merger import Split, split_budget
from tdm_lightning.ops import cluster_density_peaks, match_pairs, pairwise_distances

RATES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
OPTIONS = [
    TokenMerger(),
    TokenMerger(density="knn", neighbours=3, matching="greedy", match_weights="mean"),
    TokenMerger(cluster_fraction=1.0, cluster_weights="mean"),
    TokenMerger(attentive_ratio=0.5),
]


def tokens(n, seed=0, batch=2, width=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, width, generator=generator), torch.rand(
        batch, n, generator=generator
    )


def test_every_length_and_rate_has_a_split_that_adds_up():
    for n, rate in itertools.product(range(2, 197), RATES):
        keep = math.ceil(rate * n)
        if keep == n:
            continue
        split = split_budget(n, keep)
        inattentive = n - split.attentive
        assert split.attentive - split.pairs + split.clusters == keep
        assert 0 <= split.pairs <= split.attentive // 2
        assert 1 <= split.clusters <= inattentive
        if keep > 1:  # the rule as the reference states it
            assert split.attentive == keep
            assert (
                split.clusters
                == split.pairs
                == max(1, min(math.ceil((n - keep) / 4), n - keep, keep // 2))
            )


@pytest.mark.parametrize(
    ("n", "keep", "split"),
    [
        (196, 138, (138, 15, 15)),
        (138, 97, (97, 11, 11)),
        (97, 68, (68, 8, 8)),
        (196, 40, (40, 20, 20)),
        (40, 8, (8, 4, 4)),
        (8, 2, (2, 1, 1)),
        (5, 1, (0, 1, 0)),
        (2, 1, (0, 1, 0)),
    ],
)
def test_default_splits(n, keep, split):
    assert split_budget(n, keep) == Split(*split)


@given(n=st.integers(2, 196), data=st.data(), fraction=st.floats(0.01, 1), ratio=st.floats(0.01, 1))
def test_a_split_is_feasible_or_refused(n, data, fraction, ratio):
    keep = data.draw(st.integers(1, n - 1))
    attentive = math.ceil(ratio * n)
    feasible = keep == 1 or any(
        0 <= attentive + clusters - keep <= attentive // 2 and (clusters >= 1 or attentive == n)
        for clusters in range(n - attentive + 1)
    )
    if not feasible:
        with pytest.raises(ValueError, match="no feasible split"):
            split_budget(n, keep, fraction, ratio)
        return
    split = split_budget(n, keep, fraction, ratio)
    assert split.attentive - split.pairs + split.clusters == keep
    assert 0 <= split.pairs <= split.attentive // 2
    assert 0 <= split.clusters <= n - split.attentive


@pytest.mark.parametrize("merger", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("n", "keep"), [(2, 1), (3, 2), (9, 1), (9, 5), (40, 28), (41, 21), (196, 138)]
)
def test_exactly_the_budget_and_every_token_accounted_for(merger, n, keep):
    if merger.attentive_ratio is not None and not n / 2 <= keep * 2 <= n * 1.5:
        keep = math.ceil(0.6 * n)
    if keep >= n:
        return
    x, importance = tokens(n)
    reduction = merger(Seen(x, importance=importance), keep)
    assert reduction.x.shape == (2, keep, 6)
    for image in range(2):
        held = reduction.assignment[image].tolist()
        assert sorted(set(held)) == list(range(keep))
        for j in range(n):
            role, alone = reduction.role[image, j], held.count(held[j]) == 1
            assert role in (Role.KEPT, Role.MATCHED, Role.CLUSTERED)
            assert (role != Role.KEPT) or alone
            assert (role != Role.MATCHED) or not alone


@given(n=st.integers(3, 40), rate=st.sampled_from(RATES), seed=st.integers(0, 10**6))
def test_each_token_is_the_attention_weighted_mean_of_its_group(n, rate, seed):
    """Everything but the grouping, by loops: order of the groups, values, roles."""
    keep = math.ceil(rate * n)
    if keep == n:
        return
    x, importance = tokens(n, seed)
    reduction = TokenMerger()(Seen(x, importance=importance), keep)
    for image in range(2):
        held = reduction.assignment[image].numpy()
        for group in range(keep):
            members = np.flatnonzero(held == group)
            a = importance[image, members].double().numpy()
            wanted = ((a / a.sum())[:, None] * x[image, members].double().numpy()).sum(0)
            np.testing.assert_allclose(reduction.x[image, group], wanted, atol=1e-5)
            if len(members) == 1:
                assert torch.equal(reduction.x[image, group], x[image, members[0]])


def test_parts_are_the_functions_applied_to_the_two_kinds():
    x, importance = tokens(40)
    reduction = TokenMerger()(Seen(x, importance=importance), 28)
    split = split_budget(40, 28)
    for image in range(2):
        ranked = sorted(range(40), key=lambda j: -importance[image, j].item())
        attentive, inattentive = ranked[:28], ranked[28:]
        pair = match_pairs(x[image, attentive][None], split.pairs)
        label, _ = cluster_density_peaks(x[image, inattentive][None], split.clusters)
        assert reduction.assignment[image, attentive].tolist() == pair[0].tolist()
        assert (
            reduction.assignment[image, inattentive].tolist()
            == (label[0] + 28 - split.pairs).tolist()
        )


def test_other_features_decide_the_groups_but_are_not_merged():
    x, importance = tokens(20)
    features, _ = tokens(20, seed=5, width=3)
    reduction = TokenMerger(features="keys")(Seen(x, importance=importance, keys=features), 12)
    assert torch.equal(
        reduction.assignment, TokenMerger()(Seen(features, importance=importance), 12).assignment
    )
    assert reduction.x.shape == (2, 12, 6)


@pytest.mark.parametrize("merger", OPTIONS, ids=str)
def test_commutes_with_a_permutation(merger):
    x, importance = tokens(30)
    shuffle = torch.randperm(30)
    before, after = (
        merger(Seen(x, importance=importance), 18),
        merger(Seen(x[:, shuffle], importance=importance[:, shuffle]), 18),
    )
    torch.testing.assert_close(after.x, before.x)
    assert torch.equal(after.assignment, before.assignment[:, shuffle])
    assert torch.equal(after.role, before.role[:, shuffle])


@pytest.mark.parametrize("merger", OPTIONS, ids=str)
def test_gradients_reach_tokens_and_importance_and_are_finite(merger):
    x, importance = tokens(20)
    x[0, 3] = x[0, 4]  # twins: a distance of exactly zero
    importance[1] = 0  # no attention at all
    x.requires_grad_()
    importance.requires_grad_()
    merger(Seen(x, importance=importance), 12).x.square().sum().backward()
    assert x.grad.isfinite().all()
    assert importance.grad.isfinite().all()
    assert importance.grad[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("merger", OPTIONS, ids=str)
def test_half_precision_is_finite_even_for_large_tokens(merger, dtype):
    x, importance = tokens(20)
    reduction = merger(Seen((x * 3000).to(dtype), importance=importance), 12)
    assert reduction.x.dtype == dtype
    assert reduction.x.isfinite().all()


def photograph(patch=14, grid=14):
    """Patch features of a real photograph: the lowest spatial frequencies of every patch and
    colour.
    """
    image = load_sample_image("china.jpg")
    side = patch * grid
    image = (
        torch.from_numpy(np.array(image[: 2 * side : 2, 100 : 100 + 2 * side : 2])).float() / 255
    )
    patches = image.unfold(0, patch, patch).unfold(1, patch, patch).flatten(0, 1)  # N×3×p×p
    phase = torch.arange(patch) + 0.5
    waves = torch.stack([torch.cos(math.pi * k * phase / patch) for k in range(4)]) / patch
    return torch.einsum("nchw,ih,jw->ncij", patches, waves, waves).flatten(1).unsqueeze(0)


def spread(x, group):
    """Sum of the distances of all pairs that share a group."""
    together = (group.unsqueeze(1) == group.unsqueeze(2)).float()
    return (pairwise_distances(x) * together).sum().item()


@pytest.mark.parametrize("density", ["gaussian", "knn"])
def test_on_a_photograph_clusters_are_tighter_than_random_ones_of_the_same_sizes(density):
    x = photograph()[:, torch.randperm(196)[:58]]
    labels, _ = cluster_density_peaks(x, 15, density)
    random = [spread(x, labels[:, torch.randperm(58)]) for _ in range(100)]
    assert spread(x, labels) < 0.9 * min(random)


@pytest.mark.parametrize("matching", ["bipartite", "greedy"])
def test_on_a_photograph_fused_tokens_are_closer_than_random_ones(matching):
    x = photograph()[:, torch.randperm(196)[:138]]
    group = match_pairs(x, 15, matching)
    unit = torch.nn.functional.normalize(x, dim=-1)
    random = [spread(unit, group[:, torch.randperm(138)]) for _ in range(100)]
    assert spread(unit, group) < 0.5 * min(random)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_on_a_photograph_merged_groups_are_tighter_than_random_ones(rate):
    x = photograph()
    importance = x.square().sum(-1)
    assignment = TokenMerger()(Seen(x, importance=importance), math.ceil(rate * 196)).assignment
    random = [spread(x, assignment[:, torch.randperm(196)]) for _ in range(100)]
    assert spread(x, assignment) < 0.7 * min(random)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cluster_fraction": 0}, ValueError, "cluster_fraction must lie in"),
        ({"cluster_fraction": 1.5}, ValueError, "cluster_fraction must lie in"),
        ({"cluster_fraction": "half"}, TypeError, "cluster_fraction must be a number"),
        ({"attentive_ratio": float("nan")}, ValueError, "attentive_ratio must lie in"),
        ({"neighbours": 0}, ValueError, "neighbours must be at least 1"),
        ({"neighbours": 2.5}, TypeError, "neighbours must be an integer"),
        ({"neighbours": True}, TypeError, "neighbours must be an integer"),
        (
            {"density": "flat"},
            ValueError,
            "density must be one of 'gaussian', 'knn', got 'flat'",
        ),
        ({"assignment": "nearest"}, TypeError, "assignment"),
        ({"cluster_weights": 3}, ValueError, "cluster_weights must be one of"),
        ({"matching": "random"}, ValueError, "matching must be one of"),
        ({"match_weights": "sum"}, ValueError, "match_weights must be one of"),
        ({"features": "values"}, ValueError, "features must be one of"),
        ({"colour": "red"}, TypeError, "colour"),
    ],
)
def test_bad_options(arguments, error, message):
    with pytest.raises(error, match=message):
        TokenMerger(**arguments)
