"""Inner products in Triton against torch's."""

import pytest
import torch
from torch import Tensor

from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tests.helpers.plans import COUNTS, TYPES, check_operator, patches

pytest.importorskip("triton")
from tdm_lightning.ops.kernels.inner import inner_products


@pytest.mark.parametrize("dtype", [*TYPES, torch.float64])
def test_products(dtype):
    for n in COUNTS:
        for batch, width in ((1, 24), (3, 65)):
            x = patches(batch, n, width, dtype)
            full = x.double()
            expected = (full @ full.transpose(1, 2)).float()
            torch.testing.assert_close(inner_products(x), expected, atol=1e-5, rtol=1e-5)


def test_any_strides():
    x = torch.randn(2, 20, 3, 9)
    for view in (x[:, :, 1], x[:, ::2, 1], x[:, :, 0].transpose(1, 2), x[:, :5, 2, ::2]):
        expected = view @ view.transpose(1, 2)
        torch.testing.assert_close(inner_products(view), expected, atol=1e-5, rtol=1e-5)


def test_half_precision_does_not_overflow():
    x = torch.full((1, 2, 64), 300.0, dtype=torch.float16)
    assert inner_products(x).tolist() == [[[300.0**2 * 64] * 2] * 2]


def test_no_images():
    assert inner_products(torch.randn(0, 5, 8)).shape == (0, 5, 5)


def test_the_most_tokens():
    x = patches(1, 1369, 8)
    torch.testing.assert_close(inner_products(x), x @ x.transpose(1, 2), atol=1e-5, rtol=1e-5)


@in_two_forms("tdm_lightning.ops.kernels.inner:inner_products", lambda x: None)
def tried_inner_products(x: Tensor) -> Tensor:
    # of small whole numbers, so that both forms are exact
    return x.float() @ x.float().transpose(1, 2)


def test_it_is_an_operator():
    check_operator(tried_inner_products, torch.randint(-5, 6, (2, 9, 8)).float())
