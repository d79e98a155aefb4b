"""Alternating pairs in Triton against torch's."""

import pytest
import torch
from torch import Tensor

from tdm_lightning.ops import match_alternating as torch_form
from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tests.helpers.plans import COUNTS, TYPES, check_operator, is_grouping, patches

pytest.importorskip("triton")
from tdm_lightning.ops.kernels.alternating import match_alternating


@pytest.mark.parametrize(
    ("dtype", "counts"),
    [(torch.float32, COUNTS), *((other, (7, 65)) for other in (*TYPES[1:], torch.float64))],
)
def test_pairs(dtype, counts):
    for n in counts:
        for batch, width, share, prefix in ((1, 16, 1.0, 1), (3, 70, 0.3, 1), (3, 16, 0.7, 2)):
            if n == 1 and prefix == 2:
                continue  # torch finds no largest of no similarities
            x, pairs = patches(batch, n, width, dtype), int(share * (n // 2))
            expected = torch_form(x, pairs, prefix)
            assert torch.equal(match_alternating(x, pairs, prefix), expected)


def test_one_token_alone():
    assert match_alternating(torch.randn(2, 1, 4), 0, 2).tolist() == [[0], [0]]


def test_the_most_tokens():
    x = patches(1, 1369, 64)
    assert torch.equal(match_alternating(x, 400, 1), torch_form(x, 400, 1))


def test_equal_proposals_are_accepted_by_place():
    found = match_alternating(torch.ones(2, 9, 4), 2, 0)
    # 0 and 2 go into 1, the first partner, behind the three even ones that stay
    assert found.tolist() == [[3, 3, 3, 4, 0, 5, 1, 6, 2]] * 2


def test_ties_and_numbers_that_are_none_still_give_groups():
    x = torch.eye(3)[torch.randint(0, 3, (3, 300))]
    x[1, 5], x[2] = torch.nan, 0
    group = match_alternating(x, 90, 1)
    assert is_grouping(group, 210)
    assert torch.equal(group, match_alternating(x, 90, 1))


@in_two_forms("tdm_lightning.ops.kernels.alternating:match_alternating", lambda *args: None)
def tried_alternating(features: Tensor, pairs: int, prefix: int) -> Tensor:
    return torch_form(features, pairs, prefix)


def test_it_is_an_operator():
    check_operator(tried_alternating, patches(2, 12, 8), 4, 1)
