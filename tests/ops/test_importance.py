"""The class token's row of attention, computed beside the kernel, against the full attention
map.
"""

import pytest
import torch
from timm.layers import Attention
from torch import nn

from tdm_lightning.ops import QueryKey, class_row, mean_keys, received_attention

HEADS, WIDTH = 4, 32


def attention_of(layer, x, key_bias=None):
    """Full softmax map and keys of a timm attention layer, B×H×T×T and B×H×T×d, spelled
    out.
    """
    q, k, _ = layer.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    q, k = layer.q_norm(q), layer.k_norm(k)
    logits = q @ k.transpose(-2, -1) * layer.scale
    return (logits if key_bias is None else logits + key_bias).softmax(-1), k


def layer_and_projections(qkv_bias=True, qk_norm=False):
    layer = Attention(
        WIDTH,
        HEADS,
        qkv_bias=qkv_bias,
        qk_norm=qk_norm,
        norm_layer=nn.LayerNorm if qk_norm else None,
    )
    nn.init.normal_(layer.qkv.weight, std=0.4)
    if qkv_bias:
        nn.init.normal_(layer.qkv.bias)
    weight, bias = layer.qkv.weight, layer.qkv.bias
    parts = (weight[:WIDTH], bias[:WIDTH] if qkv_bias else None, weight[WIDTH : 2 * WIDTH])
    norms = (layer.q_norm, layer.k_norm) if qk_norm else (None, None)
    return layer, QueryKey(
        *parts, bias[WIDTH : 2 * WIDTH] if qkv_bias else None, HEADS, layer.scale, *norms
    )


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_equals_the_full_attention_map(qkv_bias, qk_norm, biased):
    layer, qk = layer_and_projections(qkv_bias, qk_norm)
    x = torch.randn(2, 11, WIDTH)
    bias = torch.randn(2, 1, 1, 11) if biased else None
    full, keys = attention_of(layer, x, bias)
    for rows in (1, 2):
        torch.testing.assert_close(
            class_row(x, qk, rows, bias), full[:, :, :rows], atol=1e-5, rtol=1e-4
        )
    wanted = full[:, :, 3:, 3:].mean(dim=(1, 2))
    torch.testing.assert_close(received_attention(x, qk, 3, bias), wanted, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(mean_keys(x, qk), keys.mean(1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_class_attention_is_not_renormalised_over_patches():
    _, qk = layer_and_projections()
    row = class_row(torch.randn(3, 9, WIDTH), qk).mean(dim=(1, 2))
    torch.testing.assert_close(row[:, 1:].sum(1), 1 - row[:, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision_row_is_as_good_as_its_inputs(dtype):
    """Logits of peaked attention reach tens; rounded to half precision they would spoil the order
    of the tokens.
    """
    layer, _ = layer_and_projections()
    x = torch.randn(4, 50, WIDTH).to(dtype)
    layer = layer.to(dtype)
    weight, bias = layer.qkv.weight, layer.qkv.bias
    half = QueryKey(
        weight[:WIDTH],
        bias[:WIDTH],
        weight[WIDTH : 2 * WIDTH],
        bias[WIDTH : 2 * WIDTH],
        HEADS,
        layer.scale,
    )
    rounded = QueryKey(
        *(p.float() for p in (half.q_weight, half.q_bias, half.k_weight, half.k_bias)),
        HEADS,
        layer.scale,
    )
    found, wanted = class_row(x, half), class_row(x.float(), rounded)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() < {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    assert (received_attention(x, half) - received_attention(x.float(), rounded)).abs().max() < 2e-2


@torch.no_grad()
def test_large_activations_do_not_overflow_in_float16():
    """Features of some hundreds, as large ViTs have them: products of q, W and x pass 65504 on the
    way.
    """
    weight = torch.full((WIDTH, WIDTH), 0.5, dtype=torch.float16)
    qk = QueryKey(weight, None, weight, None, HEADS, (WIDTH // HEADS) ** -0.5)
    x = torch.full((1, 5, WIDTH), 40.0, dtype=torch.float16)
    x[:, 1] = -40
    row = class_row(x, qk)
    assert row.isfinite().all()
    torch.testing.assert_close(row.sum(-1), torch.ones(1, HEADS, 1))
    assert received_attention(x, qk).isfinite().all()
