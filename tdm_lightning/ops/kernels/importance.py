"""The class token's attention, read from queries and keys as they lie in a packed projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Numbers of all heads' keys that are looked at together.
_TILE = 16384
_WARPS = 8


def class_importance(q: Tensor, k: Tensor, scale: float, rows: int, bias: Tensor | None) -> Tensor:
    """The kernel of :func:`tdm_lightning.ops.class_importance`."""
    batch, heads, n, width = k.shape
    out = torch.empty(batch, n, dtype=torch.float32, device=q.device)
    tile = {"HEADS": triton.next_power_of_2(heads), "WIDTH": triton.next_power_of_2(width)}
    keys = max(1, _TILE // (tile["HEADS"] * tile["WIDTH"]))
    with torch.cuda.device_of(q):
        _class_importance[(batch,)](
            q,
            k,
            out if bias is None else bias,
            out,
            n,
            heads,
            width,
            scale,
            *q.stride(),
            *k.stride(),
            *((0, 0) if bias is None else (bias.stride(0), bias.stride(3))),
            BIAS=bias is not None,
            ROWS=min(rows, q.shape[2]),
            KEYS=min(keys, triton.next_power_of_2(n)),
            **tile,
            num_warps=_WARPS,
        )
    return out


@triton.jit(do_not_specialize=["n", "scale"])
def _class_importance(
    q: tl.tensor,
    k: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    q_image: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    q_channel: tl.tensor,
    k_image: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    k_channel: tl.tensor,
    bias_image: tl.tensor,
    bias_token: tl.tensor,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """One program: an image. All heads of some keys are read together, for so they lie; twice, the
    second time from the cache, once the sum of every head's softmax is known.
    """
    image = tl.program_id(0).to(tl.int64)
    q += image * q_image
    k += image * k_image
    bias += image * bias_image
    out += image * n
    head = tl.arange(0, HEADS)
    channel = tl.arange(0, WIDTH)
    real = (head < heads)[:, None] & (channel < width)[None, :]
    q_at = head[:, None].to(tl.int64) * q_head + channel[None, :] * q_channel
    k_at = head[:, None].to(tl.int64) * k_head + channel[None, :] * k_channel

    for row in tl.static_range(ROWS):
        ask = tl.load(q + row * q_token + q_at, mask=real, other=0.0).to(tl.float32) * scale
        most = tl.full((HEADS,), float("-inf"), tl.float32)
        whole = tl.zeros((HEADS,), tl.float32)
        for first in range(0, n, KEYS):
            logit = _logits(ask, k, bias, k_at, real, first, n, k_token, bias_token, BIAS, KEYS)
            higher = tl.maximum(most, tl.max(logit, 0))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            whole = whole * tl.exp(most - base) + tl.sum(tl.exp(logit - base[None, :]), 0)
            most = higher
        base = tl.where(most == float("-inf"), 0.0, most)
        part = tl.where(head < heads, 1.0 / (whole * (heads * ROWS)), 0.0)
        for first in range(0, n, KEYS):
            logit = _logits(ask, k, bias, k_at, real, first, n, k_token, bias_token, BIAS, KEYS)
            mean = tl.sum(tl.exp(logit - base[None, :]) * part[None, :], 1)
            key = first + tl.arange(0, KEYS)
            if row > 0:
                mean += tl.load(out + key, mask=key < n, other=0.0)
            tl.store(out + key, mean, mask=key < n)
        tl.debug_barrier()  # the next row adds to what this one wrote


@triton.jit
def _logits(
    ask: tl.tensor,
    k: tl.tensor,
    bias: tl.tensor,
    k_at: tl.tensor,
    real: tl.tensor,
    first: tl.tensor,
    n: tl.tensor,
    k_token: tl.tensor,
    bias_token: tl.tensor,
    BIAS: tl.constexpr,
    KEYS: tl.constexpr,
) -> tl.tensor:
    """Of some keys in every head, KEYS×HEADS; minus infinity behind the last key."""
    key = first + tl.arange(0, KEYS)
    there = key < n
    keys = tl.load(
        k + key[:, None, None].to(tl.int64) * k_token + k_at[None, :, :],
        mask=there[:, None, None] & real[None, :, :],
        other=0.0,
    )
    logit = tl.sum(keys.to(tl.float32) * ask[None, :, :], 2)
    if BIAS:
        shift = tl.load(bias + key * bias_token, mask=there, other=0.0).to(tl.float32)
        logit += shift[:, None]
    return tl.where(there[:, None], logit, float("-inf"))
