"""Groups and their weighted means, against loops."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdm_lightning.ops import combine


def means(x, group, weight, groups):
    return combine(x, group, weight, torch.ones_like(weight), groups)[0]


@given(
    n=st.integers(1, 20),
    groups=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    least=st.sampled_from([-1, 0]),
)
def test_means_and_sizes_equal_the_loops(n, groups, seed, least):
    generator = torch.Generator().manual_seed(seed)
    x, a = torch.randn(2, n, 3, generator=generator), torch.rand(2, n, generator=generator)
    group = torch.randint(least, groups, (2, n), generator=generator)
    size = torch.randint(1, 9, (2, n), generator=generator).float()
    merged, sizes = combine(x, group, a, size, groups)
    for image in range(2):
        for g in range(groups):
            members = [j for j in range(n) if group[image, j] == g]
            raw = [float(a[image, j]) for j in members]
            shares = [r / sum(raw) for r in raw]
            wanted = sum(
                (s * x[image, j].numpy() for s, j in zip(shares, members, strict=True)), np.zeros(3)
            )
            np.testing.assert_allclose(merged[image, g], wanted, atol=1e-5)
            assert sizes[image, g] == sum(size[image, j] for j in members)


def test_without_weights_a_group_becomes_the_mean_of_its_patches():
    x, group = torch.randn(1, 4, 3, requires_grad=True), torch.tensor([[1, 0, 1, -1]])
    size = torch.tensor([[3.0, 2, 5, 4]])
    found, sizes = combine(x, group, None, size, 2)
    wanted = torch.stack((x[:, 1], (3 * x[:, 0] + 5 * x[:, 2]) / 8), dim=1)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(found[:, 0], x[:, 1])
    assert sizes.tolist() == [[2, 8]]
    found.sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0], torch.tensor([3 / 8, 1, 5 / 8, 0]))


@pytest.mark.parametrize("score", [0.0, 1e-30, 1e-6, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_alone_passes_bit_by_bit(score, dtype):
    x = torch.randn(1, 3, 5).to(dtype)
    found = means(x, torch.tensor([[2, 0, 1]]), torch.full((1, 3), score), 3)
    assert torch.equal(found, x[:, [1, 2, 0]])


def test_a_group_without_any_attention_becomes_its_mean():
    x = torch.randn(1, 4, 5)
    found = means(x, torch.tensor([[0, 0, 0, 1]]), torch.zeros(1, 4), 2)
    torch.testing.assert_close(found, torch.stack((x[:, :3].mean(1), x[:, 3]), dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_normalised_in_float32(dtype):
    weight = torch.tensor([[1e-7, 3e-7]], dtype=dtype)
    found = means(torch.ones(1, 2, 1), torch.tensor([[0, 0]]), weight, 1)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(1)


def test_doubles_stay_doubles():
    x, weight = torch.randn(1, 4, 3).double(), torch.rand(1, 4).double()
    found = means(x, torch.zeros(1, 4, dtype=torch.int64), weight, 1)
    wanted = (x * weight[..., None]).sum(1, keepdim=True) / weight.sum()
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=1e-11)


def test_gradients_flow_through_tokens_and_weights():
    x = torch.randn(1, 4, 3, dtype=torch.float64, requires_grad=True)
    a = torch.rand(1, 4, dtype=torch.float64).add(0.1).requires_grad_()
    group = torch.tensor([[0, 1, 0, 1]])
    total = means(x, group, a, 2).square().sum()
    gradient_x, gradient_a = torch.autograd.grad(total, (x, a))
    assert gradient_a.abs().min() > 0
    torch.testing.assert_close(
        gradient_x[0, 0] / gradient_x[0, 2], (a[0, 0] / a[0, 2]).expand(3), atol=1e-5, rtol=1e-5
    )


def test_gradients_stay_finite_without_any_attention():
    a = torch.zeros(1, 3, requires_grad=True)
    x = torch.randn(1, 3, 2, requires_grad=True)
    means(x, torch.zeros(1, 3, dtype=torch.int64), a, 1).sum().backward()
    assert a.grad.isfinite().all()
    assert x.grad.isfinite().all()
