"""Mutual nearest neighbours against plain loops, and at the edges."""

import pytest
import torch

from tdm_lightning.ops import mutual_neighbours


def plain_pairs(x, valid):
    """The same with loops, of one image: the partner of every token."""

    def cosine(i, j):
        return float(x[i] @ x[j] / (x[i].norm() * x[j].norm()).clamp(min=1e-12))

    real = [i for i in range(len(x)) if valid[i]]
    nearest = {}
    for i in real:
        others = [j for j in real if j != i]
        if others:
            nearest[i] = max(others, key=lambda j: cosine(i, j))
    partner = list(range(len(x)))
    for i, j in nearest.items():
        if nearest[j] == i:
            partner[i] = j
    return partner


@pytest.mark.parametrize("n", [1, 2, 3, 9, 16])
def test_against_plain_loops(n):
    x = torch.randn(4, n, 5, dtype=torch.float64)
    valid = torch.rand(4, n) > 0.3
    for mask in (None, valid):
        found = mutual_neighbours(x, mask)
        for image in range(4):
            real = torch.ones(n, dtype=torch.bool) if mask is None else mask[image]
            assert found[image].tolist() == plain_pairs(x[image], real)


def test_pairs_are_symmetric_and_disjoint():
    found = mutual_neighbours(torch.randn(2, 40, 8))
    assert torch.equal(found.gather(1, found), torch.arange(40).expand(2, -1))
    assert (found != torch.arange(40)).any()


def test_the_length_of_a_token_plays_no_part():
    x = torch.randn(2, 12, 6)
    assert torch.equal(mutual_neighbours(x), mutual_neighbours(x * torch.rand(2, 12, 1).add(0.5)))


def test_edges():
    assert mutual_neighbours(torch.randn(2, 0, 3)).shape == (2, 0)
    assert mutual_neighbours(torch.randn(2, 1, 3)).tolist() == [[0], [0]]
    # whatever they are, of two each is nearest to the other
    assert mutual_neighbours(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])).tolist() == [[1, 0]]
    # of equals the first is nearest, so only one pair is mutual
    assert mutual_neighbours(torch.ones(1, 5, 4)).tolist() == [[1, 0, 2, 3, 4]]
    assert mutual_neighbours(torch.zeros(1, 3, 4)).tolist() == [[1, 0, 2]]
    nobody = torch.zeros(1, 3, dtype=torch.bool)
    assert mutual_neighbours(torch.randn(1, 3, 4), nobody).tolist() == [[0, 1, 2]]


def test_a_token_that_is_not_finite_pairs_with_nobody_and_stays_in_its_image():
    x = torch.randn(2, 8, 4)
    clean = mutual_neighbours(x)
    x[0, 3] = float("nan")
    found = mutual_neighbours(x)
    assert found[0, 3] == 3
    assert torch.equal(found[1], clean[1])
