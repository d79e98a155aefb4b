"""Merging as a product with the matrix of shares, built on the fly.

No scatter and no atomics: the result does not depend on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_lightning.ops.constants import TINY
from tdm_lightning.ops.kernels.product import product, wide

#: Tokens, groups and channels of a tile, at most; a matrix product takes at least 16.
_TILE = 64
_LEAST = 16
_TINY = tl.constexpr(TINY)


def combine(
    x: Tensor, group: Tensor, weight: Tensor | None, size: Tensor, groups: int
) -> tuple[Tensor, Tensor]:
    """The kernel of :func:`tdm_lightning.ops.combine`."""
    weight = size if weight is None else weight
    batch, n, width = x.shape
    out = torch.empty(batch, groups, width, dtype=x.dtype, device=x.device)
    total = torch.empty(batch, groups, dtype=size.dtype, device=x.device)
    tile = {"GROUPS": _tile(groups), "TOKENS": _tile(n), "CHANNELS": _tile(width)}
    blocks = triton.cdiv(groups, tile["GROUPS"]), triton.cdiv(width, tile["CHANNELS"])
    with torch.cuda.device_of(x):
        _combine[(batch * blocks[0] * blocks[1],)](
            x,
            group.contiguous(),
            weight.contiguous(),
            size.contiguous(),
            out,
            total,
            n,
            groups,
            width,
            *x.stride(),
            **tile,
            WIDE=wide(x.dtype),
            num_warps=4,
        )
    return out, total


def backward(
    x: Tensor, group: Tensor, weight: Tensor, out: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """The kernel of :func:`tdm_lightning.ops.combine.combine_backward`."""
    batch, n, width = x.shape
    to_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    to_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    tokens = min(_LEAST, triton.next_power_of_2(n))
    with torch.cuda.device_of(x):
        _backward[(batch * triton.cdiv(n, tokens),)](
            x,
            group.contiguous(),
            weight.contiguous(),
            out.contiguous(),
            grad.contiguous(),
            to_x,
            to_weight,
            n,
            out.shape[1],
            width,
            *x.stride(),
            TOKENS=tokens,
            OTHERS=_tile(n),
            CHANNELS=2 * _tile(width),
            num_warps=4,
        )
    return to_x, to_weight


def _tile(count: int) -> int:
    return max(_LEAST, min(_TILE, triton.next_power_of_2(count)))


@triton.jit(do_not_specialize=["n", "groups"])
def _combine(
    x: tl.tensor,
    group: tl.tensor,
    weight: tl.tensor,
    size: tl.tensor,
    out: tl.tensor,
    total: tl.tensor,
    n: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    of_image: tl.tensor,
    of_token: tl.tensor,
    of_channel: tl.tensor,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """One program: some groups and channels of an image."""
    program = tl.program_id(0)
    blocks = tl.cdiv(width, CHANNELS)
    column = program % blocks
    row = (program // blocks) % tl.cdiv(groups, GROUPS)
    image = (program // blocks // tl.cdiv(groups, GROUPS)).to(tl.int64)
    x += image * of_image
    group += image * n
    weight += image * n
    size += image * n
    here = row * GROUPS + tl.arange(0, GROUPS)
    channel = column * CHANNELS + tl.arange(0, CHANNELS)

    whole = tl.zeros((GROUPS,), tl.float32)
    patches = tl.zeros((GROUPS,), tl.float32)
    for first in range(0, n, TOKENS):
        token = first + tl.arange(0, TOKENS)
        real = token < n
        member = tl.load(group + token, mask=real, other=-1)[None, :] == here[:, None]
        raw = tl.load(weight + token, mask=real, other=0.0).to(tl.float32) + _TINY
        whole += tl.sum(tl.where(member, raw[None, :], 0.0), 1)
        stands = tl.load(size + token, mask=real, other=0.0).to(tl.float32)
        patches += tl.sum(tl.where(member, stands[None, :], 0.0), 1)
    if column == 0:
        tl.store(total + image * groups + here, patches, mask=here < groups)

    whole = tl.where(whole > 0, whole, 1.0)  # an empty group's
    sums = tl.zeros((GROUPS, CHANNELS), tl.float32)
    for first in range(0, n, TOKENS):
        token = first + tl.arange(0, TOKENS)
        real = token < n
        member = tl.load(group + token, mask=real, other=-1)[None, :] == here[:, None]
        raw = tl.load(weight + token, mask=real, other=0.0).to(tl.float32) + _TINY
        # rounded to the nearest: of a token alone it is exactly one
        raw, divisor = tl.broadcast(raw[None, :], whole[:, None])
        share = tl.where(member, tl.div_rn(raw, divisor), 0.0)
        tokens = tl.load(
            x + token[:, None].to(tl.int64) * of_token + channel[None, :] * of_channel,
            mask=real[:, None] & (channel < width)[None, :],
            other=0.0,
        )
        sums = product(share.to(tokens.dtype), tokens, sums, WIDE)
    tl.store(
        out + (image * groups + here[:, None]) * width + channel[None, :],
        sums.to(out.dtype.element_ty),
        mask=(here < groups)[:, None] & (channel < width)[None, :],
    )


@triton.jit(do_not_specialize=["n", "groups"])
def _backward(
    x: tl.tensor,
    group: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    grad: tl.tensor,
    to_x: tl.tensor,
    to_weight: tl.tensor,
    n: tl.tensor,
    groups: tl.tensor,
    width: tl.tensor,
    of_image: tl.tensor,
    of_token: tl.tensor,
    of_channel: tl.tensor,
    TOKENS: tl.constexpr,
    OTHERS: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> None:
    """One program: some tokens of an image.

    Of a group with weights w and mean m, dm = Σ dw·(x − m) / Σ w.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(n, TOKENS)
    image = (program // blocks).to(tl.int64)
    x += image * of_image
    group += image * n
    weight += image * n
    token = (program % blocks) * TOKENS + tl.arange(0, TOKENS)
    real = token < n
    mine = tl.load(group + token, mask=real, other=-1)

    whole = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, n, OTHERS):
        other = first + tl.arange(0, OTHERS)
        there = other < n
        member = tl.load(group + other, mask=there, other=-2)[None, :] == mine[:, None]
        raw = tl.load(weight + other, mask=there, other=0.0).to(tl.float32) + _TINY
        whole += tl.sum(tl.where(member, raw[None, :], 0.0), 1)
    whole = tl.where(whole > 0, whole, 1.0)  # of rows behind the last token
    raw = tl.load(weight + token, mask=real, other=0.0).to(tl.float32) + _TINY
    share = tl.div_rn(raw, whole)

    kept = real & (mine >= 0)
    source = (image * groups + tl.where(kept, mine, 0))[:, None] * width
    target = (image * n + token)[:, None] * width
    gain = tl.zeros((TOKENS,), tl.float32)
    for first in range(0, width, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside = (channel < width)[None, :]
        at = source + channel[None, :]
        received = tl.load(grad + at, mask=kept[:, None] & inside, other=0.0).to(tl.float32)
        mean = tl.load(out + at, mask=kept[:, None] & inside, other=0.0).to(tl.float32)
        value = tl.load(
            x + token[:, None].to(tl.int64) * of_token + channel[None, :] * of_channel,
            mask=kept[:, None] & inside,
            other=0.0,
        ).to(tl.float32)
        gain += tl.sum((value - mean) * received, 1)
        tl.store(
            to_x + target + channel[None, :],
            (share[:, None] * received).to(to_x.dtype.element_ty),
            mask=real[:, None] & inside,
        )
    gain = tl.div_rn(gain, whole)
    tl.store(to_weight + image * n + token, gain.to(to_weight.dtype.element_ty), mask=real)
