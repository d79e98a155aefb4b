"""The class token's row of attention, and what patches receive, against the full attention map."""

import pytest
import torch

from tdm_lightning.ops import class_attention, received_attention

HEADS, WIDTH = 4, 8
SCALE = WIDTH**-0.5


def queries_and_keys(batch=2, tokens=11, std=1.5):
    return torch.randn(2, batch, HEADS, tokens, WIDTH).mul(std).unbind(0)


@pytest.mark.parametrize("bias", [None, (2, 1, 1, 11), (1, HEADS, 11, 11)], ids=str)
@pytest.mark.parametrize("rows", [1, 2])
def test_equals_the_full_attention_map(bias, rows):
    q, k = queries_and_keys()
    bias = None if bias is None else torch.randn(bias)
    logits = q @ k.transpose(-2, -1) * SCALE
    full = (logits if bias is None else logits + bias).softmax(-1)
    found = class_attention(q, k, SCALE, rows, bias)
    torch.testing.assert_close(found, full[:, :, :rows], atol=1e-6, rtol=1e-4)
    wanted = full[:, :, 3:, 3:].mean(dim=(1, 2))
    found = received_attention(q, k, SCALE, 3, bias)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_class_attention_is_not_renormalized_over_patches():
    row = class_attention(*queries_and_keys(), SCALE).mean(dim=(1, 2))
    torch.testing.assert_close(row[:, 1:].sum(1), 1 - row[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_row_is_as_good_as_its_inputs(dtype):
    """Logits of peaked attention reach tens; rounded to half precision they would spoil the order
    of the tokens.
    """
    q, k = (x.to(dtype) for x in queries_and_keys(tokens=50, std=4.0))
    found = class_attention(q, k, SCALE)
    assert found.dtype == torch.float32
    wanted = class_attention(q.float(), k.float(), SCALE)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_large_activations_do_not_overflow_in_float16():
    """Products of queries and keys pass 65504 on the way."""
    q = torch.full((1, HEADS, 5, WIDTH), 300.0, dtype=torch.float16)
    k = q.clone()
    k[:, :, 1] = -300
    row = class_attention(q, k, SCALE)
    assert row.isfinite().all()
    torch.testing.assert_close(row.sum(-1), torch.ones(1, HEADS, 1))
    assert received_attention(q, k, SCALE).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strided", [False, True])
def test_one_row_without_gradients_is_the_same(dtype, strided):
    """There the products are taken token by token."""
    q, k = (x.to(dtype) for x in queries_and_keys())
    if strided:  # as they lie in a projection of both
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    for bias in (None, torch.randn(len(q), 1, 1, k.shape[2])):
        wanted = class_attention(q, k, SCALE, bias=bias)
        with torch.no_grad():
            torch.testing.assert_close(class_attention(q, k, SCALE, bias=bias), wanted)
