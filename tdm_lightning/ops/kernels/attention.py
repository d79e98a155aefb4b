"""Attention with a bias for every key, straight from a packed projection.

The softmax is followed over tiles of keys (Dao et al., FlashAttention, 2022), in powers of two. Its
sums are found anew in the backward pass, which costs one more product there and keeps the operator
free of outputs that only a kernel can give.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_lightning.ops.kernels.product import product, wide

#: Of e to the base two.
_LOG2E = tl.constexpr(1.4426950408889634)
#: Queries and keys of a tile, at most; a matrix product takes at least 16.
_TILE = 64
_LEAST = 16


def attention_by_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """The kernel of :func:`tdm_lightning.ops.attention.attention_by_rows`."""
    q, k, v = (_dense(x) for x in (q, k, v))
    batch, heads, n, width = q.shape
    out = torch.empty(batch, n, heads, width, dtype=q.dtype, device=q.device)
    tiles = _tiles(q, k)
    with torch.cuda.device_of(q):
        _forward[(batch * heads * triton.cdiv(n, tiles["QUERIES"]),)](
            q, k, v, bias, out, *_sizes(q, k, bias, scale), *_strides(q, k, v), **tiles
        )
    return out


def backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, out: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels of :func:`tdm_lightning.ops.attention.attention_backward`."""
    q, k, v = (_dense(x) for x in (q, k, v))
    out, grad = out.contiguous(), grad.contiguous()
    batch, heads, n, width = q.shape
    to_q = torch.empty(batch, n, heads, width, dtype=q.dtype, device=q.device)
    to_k, to_v = (
        torch.empty(batch, k.shape[2], heads, width, dtype=q.dtype, device=q.device)
        for _ in range(2)
    )
    # of every query: the logarithm of its softmax's sum, and what all its logits give back
    sums, common = (
        torch.empty(batch, heads, n, dtype=torch.float32, device=q.device) for _ in range(2)
    )
    sizes, strides, tiles = _sizes(q, k, bias, scale), _strides(q, k, v), _tiles(q, k)
    with torch.cuda.device_of(q):
        _to_queries[(batch * heads * triton.cdiv(n, tiles["QUERIES"]),)](
            q, k, v, bias, out, grad, to_q, sums, common, *sizes, *strides, **tiles
        )
        _to_keys[(batch * heads * triton.cdiv(k.shape[2], tiles["KEYS"]),)](
            q, k, v, bias, grad, to_k, to_v, sums, common, *sizes, *strides, **tiles
        )
    return to_q, to_k, to_v


def _dense(x: Tensor) -> Tensor:
    """With the numbers of a head one after another."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Any, ...]:
    _, heads, n, width = q.shape
    return n, k.shape[2], heads, width, scale, bias.stride(0), bias.stride(3)


def _strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]


def _tiles(q: Tensor, k: Tensor) -> dict[str, Any]:
    most = _TILE if q.dtype != torch.float32 else _TILE // 2  # twice as wide
    queries, keys = (max(_LEAST, min(most, triton.next_power_of_2(x.shape[2]))) for x in (q, k))
    return {
        "QUERIES": queries,
        "KEYS": keys,
        "WIDTH": max(_LEAST, triton.next_power_of_2(q.shape[3])),
        "WIDE": wide(q.dtype),
        "num_warps": 4,
        "num_stages": 2,
    }


@triton.jit
def _rows(
    x: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Rows of a head, R×WIDTH; zero behind the last and beyond the width."""
    channel = tl.arange(0, WIDTH)
    return tl.load(
        x + row[:, None].to(tl.int64) * stride + channel[None, :],
        mask=(row < count)[:, None] & (channel < width)[None, :],
        other=0.0,
    )


@triton.jit
def _store(
    x: tl.tensor,
    value: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    WIDTH: tl.constexpr,
) -> None:
    channel = tl.arange(0, WIDTH)
    tl.store(
        x + row[:, None].to(tl.int64) * stride + channel[None, :],
        value.to(x.dtype.element_ty),
        mask=(row < count)[:, None] & (channel < width)[None, :],
    )


@triton.jit
def _shifts(bias: tl.tensor, key: tl.tensor, count: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """The bias of some keys, in powers of two; minus infinity behind the last."""
    there = key < count
    shift = tl.load(bias + key * stride, mask=there, other=0.0).to(tl.float32)
    return tl.where(there, shift * _LOG2E, float("-inf"))


@triton.jit(do_not_specialize=["n", "m", "scale"])
def _forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    bias_image: tl.tensor,
    bias_key: tl.tensor,
    q_image: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_image: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_image: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One program: some queries of a head of an image."""
    program = tl.program_id(0)
    tiles = tl.cdiv(n, QUERIES)
    query = (program % tiles) * QUERIES + tl.arange(0, QUERIES)
    head = ((program // tiles) % heads).to(tl.int64)
    image = (program // tiles // heads).to(tl.int64)
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    bias += image * bias_image
    ask = _rows(q + image * q_image + head * q_head, query, n, q_token, width, WIDTH)
    factor = scale * _LOG2E
    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    whole = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first in range(0, m, KEYS):
        key = first + tl.arange(0, KEYS)
        keys = _rows(k, key, m, k_token, width, WIDTH)
        values = _rows(v, key, m, v_token, width, WIDTH)
        logit = product(ask, tl.trans(keys), tl.zeros((QUERIES, KEYS), tl.float32), WIDE)
        logit = logit * factor + _shifts(bias, key, m, bias_key)[None, :]
        higher = tl.maximum(most, tl.max(logit, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # no key so far
        weight = tl.exp2(logit - base[:, None])
        fade = tl.exp2(most - base)
        whole = whole * fade + tl.sum(weight, 1)
        mixed = product(weight.to(values.dtype), values, mixed * fade[:, None], WIDE)
        most = higher
    mixed = mixed / tl.where(whole > 0, whole, 1.0)[:, None]
    rows = heads * width
    _store(out + image * n * rows + head * width, mixed, query, n, rows, width, WIDTH)


@triton.jit(do_not_specialize=["n", "m", "scale"])
def _to_queries(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    grad: tl.tensor,
    to_q: tl.tensor,
    sums: tl.tensor,
    common: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    bias_image: tl.tensor,
    bias_key: tl.tensor,
    q_image: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_image: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_image: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One program: some queries of a head of an image; leaves what the keys' programs need."""
    program = tl.program_id(0)
    tiles = tl.cdiv(n, QUERIES)
    query = (program % tiles) * QUERIES + tl.arange(0, QUERIES)
    head = ((program // tiles) % heads).to(tl.int64)
    image = (program // tiles // heads).to(tl.int64)
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    bias += image * bias_image
    ask = _rows(q + image * q_image + head * q_head, query, n, q_token, width, WIDTH)
    rows = heads * width
    here = image * n * rows + head * width
    flow = _rows(grad + here, query, n, rows, width, WIDTH)
    result = _rows(out + here, query, n, rows, width, WIDTH)
    shared = tl.sum(flow.to(tl.float32) * result.to(tl.float32), 1)
    factor = scale * _LOG2E

    most = tl.full((QUERIES,), float("-inf"), tl.float32)
    whole = tl.zeros((QUERIES,), tl.float32)
    for first in range(0, m, KEYS):
        key = first + tl.arange(0, KEYS)
        keys = _rows(k, key, m, k_token, width, WIDTH)
        logit = product(ask, tl.trans(keys), tl.zeros((QUERIES, KEYS), tl.float32), WIDE)
        logit = logit * factor + _shifts(bias, key, m, bias_key)[None, :]
        higher = tl.maximum(most, tl.max(logit, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        whole = whole * tl.exp2(most - base) + tl.sum(tl.exp2(logit - base[:, None]), 1)
        most = higher
    # infinite where there is no key, so that all weights are zero
    level = tl.where(whole > 0, most + tl.log2(whole), float("inf"))
    at = (image * heads + head) * n + query
    tl.store(sums + at, level, mask=query < n)
    tl.store(common + at, shared, mask=query < n)

    change = tl.zeros((QUERIES, WIDTH), tl.float32)
    for first in range(0, m, KEYS):
        key = first + tl.arange(0, KEYS)
        keys = _rows(k, key, m, k_token, width, WIDTH)
        values = _rows(v, key, m, v_token, width, WIDTH)
        empty = tl.zeros((QUERIES, KEYS), tl.float32)
        logit = product(ask, tl.trans(keys), empty, WIDE)
        logit = logit * factor + _shifts(bias, key, m, bias_key)[None, :]
        weight = tl.exp2(logit - level[:, None])
        gain = weight * (product(flow, tl.trans(values), empty, WIDE) - shared[:, None])
        change = product(gain.to(keys.dtype), keys, change, WIDE)
    _store(to_q + here, change * scale, query, n, rows, width, WIDTH)


@triton.jit(do_not_specialize=["n", "m", "scale"])
def _to_keys(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    bias: tl.tensor,
    grad: tl.tensor,
    to_k: tl.tensor,
    to_v: tl.tensor,
    sums: tl.tensor,
    common: tl.tensor,
    n: tl.tensor,
    m: tl.tensor,
    heads: tl.tensor,
    width: tl.tensor,
    scale: tl.tensor,
    bias_image: tl.tensor,
    bias_key: tl.tensor,
    q_image: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_image: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_image: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One program: some keys and values of a head of an image. Tiles are keys×queries."""
    program = tl.program_id(0)
    tiles = tl.cdiv(m, KEYS)
    key = (program % tiles) * KEYS + tl.arange(0, KEYS)
    head = ((program // tiles) % heads).to(tl.int64)
    image = (program // tiles // heads).to(tl.int64)
    q += image * q_image + head * q_head
    rows = heads * width
    grad += image * n * rows + head * width
    sums += (image * heads + head) * n
    common += (image * heads + head) * n
    keys = _rows(k + image * k_image + head * k_head, key, m, k_token, width, WIDTH)
    values = _rows(v + image * v_image + head * v_head, key, m, v_token, width, WIDTH)
    shift = _shifts(bias + image * bias_image, key, m, bias_key)[:, None]
    factor = scale * _LOG2E
    key_change = tl.zeros((KEYS, WIDTH), tl.float32)
    value_change = tl.zeros((KEYS, WIDTH), tl.float32)
    for first in range(0, n, QUERIES):
        query = first + tl.arange(0, QUERIES)
        ask = _rows(q, query, n, q_token, width, WIDTH)
        flow = _rows(grad, query, n, rows, width, WIDTH)
        level = tl.load(sums + query, mask=query < n, other=float("inf"))[None, :]
        shared = tl.load(common + query, mask=query < n, other=0.0)[None, :]
        empty = tl.zeros((KEYS, QUERIES), tl.float32)
        weight = tl.exp2(product(keys, tl.trans(ask), empty, WIDE) * factor + shift - level)
        value_change = product(weight.to(flow.dtype), flow, value_change, WIDE)
        gain = weight * (product(values, tl.trans(flow), empty, WIDE) - shared)
        key_change = product(gain.to(ask.dtype), ask, key_change, WIDE)
    here = image * m * rows + head * width
    _store(to_k + here, key_change * scale, key, m, rows, width, WIDTH)
    _store(to_v + here, value_change, key, m, rows, width, WIDTH)
