"""Density-peak clustering against plain loops, and on clusters that are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning.ops import cluster_density_peaks, pairwise_distances

DENSITIES = ("gaussian", "knn")


def distances_by_loops(x):
    n, width = len(x), len(x[0])
    return [
        [math.sqrt(sum((x[i][c] - x[j][c]) ** 2 for c in range(width)) / width) for j in range(n)]
        for i in range(n)
    ]


def densities_by_loops(d, kernel, neighbours):
    n = len(d)
    if kernel == "gaussian":
        return [sum(math.exp(-(d[i][j] ** 2)) for j in range(n) if j != i) for i in range(n)]
    k = min(neighbours, n)
    return [math.exp(-sum(v**2 for v in sorted(row)[:k]) / k) for row in d]


def peaks_by_loops(x, clusters, kernel, neighbours=5):
    """Labels and centres of one token set, N×C, in the words of the method: nothing is
    vectorised.
    """
    d = distances_by_loops(x)
    n = len(d)
    rho = densities_by_loops(d, kernel, neighbours)
    by_density = sorted(range(n), key=lambda i: (-rho[i], i))
    delta = [0.0] * n
    for rank, i in enumerate(by_density):
        denser = by_density[:rank]
        delta[i] = min(d[i][j] for j in denser) if denser else max(d[i])
    score = [rho[i] * delta[i] for i in range(n)]
    # Every other score is at most the densest token's; being the densest decides an exact tie.
    centres = sorted(range(n), key=lambda i: (-score[i], i != by_density[0]))[:clusters]
    labels = [-1] * n
    for label, centre in enumerate(centres):
        labels[centre] = label
    for i in range(n):
        if labels[i] < 0:
            labels[i] = min(range(clusters), key=lambda k: d[i][centres[k]])
    return labels, centres


def test_distances_match_loops_and_have_a_zero_diagonal():
    x = torch.randn(2, 7, 5) * 3 + 40
    found = pairwise_distances(x)
    np.testing.assert_allclose(found[0], distances_by_loops(x[0].double().tolist()), atol=2e-4)
    assert found.diagonal(dim1=1, dim2=2).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distances_of_half_precision_tokens_do_not_overflow(dtype):
    x = torch.tensor([[[300.0] * 64, [-300.0] * 64, [0.0] * 64]], dtype=dtype)
    found = pairwise_distances(x)
    assert found.dtype == torch.float32
    assert found[0, 0].tolist() == pytest.approx([0, 600, 300])


@pytest.mark.parametrize("density", DENSITIES)
@given(
    n=st.integers(1, 30),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.3, 1.0, 3.0]),
)
def test_equals_the_loops(density, n, share, seed, spread):
    """Also for tokens so far apart that their densities vanish beside the token's own share of
    1.
    """
    x = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed)) * spread
    clusters = max(1, math.floor(share * n))
    labels, centres = cluster_density_peaks(x, clusters, density, neighbours=4)
    for image in range(2):
        wanted = peaks_by_loops(x[image].double().tolist(), clusters, density, neighbours=4)
        assert (labels[image].tolist(), centres[image].tolist()) == wanted


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("n", [1, 2, 5, 40, 196])
def test_always_a_partition_into_exactly_k(density, n):
    for clusters in {1, 2, n // 4, n // 2, n} - {0}:
        if clusters > n:
            continue
        labels, centres = cluster_density_peaks(torch.randn(2, n, 8), clusters, density)
        for image in range(2):
            assert sorted(set(labels[image].tolist())) == list(range(clusters))
            assert labels[image][centres[image]].tolist() == list(range(clusters))


@pytest.mark.parametrize("density", DENSITIES)
def test_identical_tokens_still_give_k_clusters(density):
    """Every distance and every score ties: no centre may be lost, no number may be undefined."""
    labels, centres = cluster_density_peaks(torch.ones(2, 9, 4), 3, density)
    assert len(set(centres[0].tolist())) == 3
    assert sorted(set(labels[0].tolist())) == [0, 1, 2]


def test_equal_densities_are_told_apart_by_rank():
    """Two far pairs whose four members are equally dense: the earlier of each pair is its
    centre.
    """
    x = torch.tensor([[[0.0], [1.0], [0.0], [1.0]]]) * 8
    labels, centres = cluster_density_peaks(x, 2)
    assert centres.tolist() == [[0, 1]]
    assert labels.tolist() == [[0, 1, 0, 1]]


@pytest.mark.parametrize("density", DENSITIES)
@given(seed=st.integers(0, 10**6), groups=st.integers(1, 6))
def test_planted_clusters_are_recovered(density, seed, groups):
    generator = torch.Generator().manual_seed(seed)
    planted = torch.arange(groups).repeat_interleave(8)[
        torch.randperm(8 * groups, generator=generator)
    ]
    centres = torch.eye(groups, 16) * 25
    x = centres[planted] + torch.randn(8 * groups, 16, generator=generator) * 0.5
    labels, _ = cluster_density_peaks(x.unsqueeze(0), groups, density)
    pairs = set(zip(planted.tolist(), labels[0].tolist(), strict=True))
    assert len(pairs) == groups  # a one-to-one map between planted and found groups


def test_no_gradient_flows_through_indices():
    x = torch.randn(1, 6, 4, requires_grad=True)
    labels, centres = cluster_density_peaks(x, 2)
    assert not labels.requires_grad
    assert not centres.requires_grad


def test_densities_that_float32_cannot_hold_are_still_told_apart():
    """A close pair, and two pairs 50 apart with densities of e^-2500: their order is that of ρ·δ
    all the same.
    """
    x = torch.tensor([[[0.0], [500.0], [50.0], [550.0], [1001.0], [1000.0]]])
    _, centres = cluster_density_peaks(x, 4)
    assert centres.tolist() == [[4, 5, 1, 0]]
