"""Weights, weighted combination, gathering and spreading out."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning.ops import gather_tokens, group_weights, merge_groups, unmerge


@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    rule=st.sampled_from(["attention", "mean"]),
)
def test_weights_and_merge_equal_the_loops(n, groups, seed, rule):
    generator = torch.Generator().manual_seed(seed)
    x, a = torch.randn(2, n, 3, generator=generator), torch.rand(2, n, generator=generator)
    group = torch.randint(groups, (2, n), generator=generator)
    weight = group_weights(a, group, groups, rule)
    merged = merge_groups(x, group, weight, groups)
    for image in range(2):
        for g in range(groups):
            members = [j for j in range(n) if group[image, j] == g]
            raw = [float(a[image, j]) if rule == "attention" else 1.0 for j in members]
            shares = [r / sum(raw) for r in raw]
            assert sum(float(weight[image, j]) for j in members) == pytest.approx(
                1 if members else 0, abs=1e-5
            )
            wanted = sum(
                (s * x[image, j].numpy() for s, j in zip(shares, members, strict=True)), np.zeros(3)
            )
            np.testing.assert_allclose(merged[image, g], wanted, atol=1e-5)


@pytest.mark.parametrize("rule", ["attention", "mean"])
@pytest.mark.parametrize("score", [0.0, 1e-30, 1e-6, 0.7])
def test_a_token_alone_weighs_exactly_one_and_passes_bit_by_bit(rule, score):
    x = torch.randn(1, 3, 5)
    group = torch.tensor([[2, 0, 1]])
    weight = group_weights(torch.full((1, 3), score), group, 3, rule)
    assert weight.tolist() == [[1.0, 1.0, 1.0]]
    assert torch.equal(merge_groups(x, group, weight, 3), x[:, [1, 2, 0]])


def test_a_group_without_any_attention_becomes_its_mean():
    weight = group_weights(torch.zeros(1, 4), torch.tensor([[0, 0, 0, 1]]), 2)
    torch.testing.assert_close(weight, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_give_float32_weights(dtype):
    weight = group_weights(torch.tensor([[1e-7, 3e-7]], dtype=dtype), torch.tensor([[0, 0]]), 1)
    assert weight.dtype == torch.float32
    assert weight.isfinite().all()
    assert weight.sum().item() == pytest.approx(1)


def test_gradients_flow_through_tokens_and_weights():
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    a = torch.rand(1, 4, dtype=torch.float64).add(0.1).requires_grad_()
    group = torch.tensor([[0, 1, 0, 1]])

    def merge(x, a):
        return merge_groups(x, group, group_weights(a, group, 2).double(), 2)

    gradient_x, gradient_a = torch.autograd.grad(merge(x, a).square().sum(), (x, a))
    assert gradient_a.abs().min() > 0
    torch.testing.assert_close(
        gradient_x[0, 0] / gradient_x[0, 2], (a[0, 0] / a[0, 2]).expand(3), atol=1e-5, rtol=1e-5
    )


def test_gradients_stay_finite_without_any_attention():
    a = torch.zeros(1, 3, requires_grad=True)
    x = torch.randn(1, 3, 2, requires_grad=True)
    group = torch.zeros(1, 3, dtype=torch.int64)
    merge_groups(x, group, group_weights(a, group, 1), 1).sum().backward()
    assert a.grad.isfinite().all()
    assert x.grad.isfinite().all()


@given(seed=st.integers(0, 10**6), n=st.integers(1, 9), m=st.integers(1, 9))
def test_gather_picks_by_position(seed, n, m):
    generator = torch.Generator().manual_seed(seed)
    x, index = (
        torch.randn(3, n, 2, generator=generator),
        torch.randint(n, (3, m), generator=generator),
    )
    found = gather_tokens(x, index)
    for image in range(3):
        for place in range(m):
            assert torch.equal(found[image, place], x[image, index[image, place]])


def test_unmerge_spreads_and_leaves_dropped_patches_empty():
    x = torch.tensor([[[1.0], [2.0]]])
    assert unmerge(x, torch.tensor([[1, -1, 0, 1]])).flatten().tolist() == [2, 0, 1, 2]
