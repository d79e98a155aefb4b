"""Bipartite matching of tokens at even and odd positions, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_lightning.ops.kernels.parts import (
    ROWS,
    STAGES,
    WARPS,
    cheapest,
    columns,
    finite,
    ranks,
    scratch,
    whole,
)
from tdm_lightning.ops.kernels.product import wide

#: Rows and columns of a tile of similarities, and the part of the width in one step.
_ROWS, _COLUMNS = 64, 64


def match_alternating(features: Tensor, pairs: int, prefix: int) -> Tensor:
    """:func:`tdm_lightning.ops.match_alternating`; of equal proposals the first is accepted.

    Args:
        features: what is compared of the patches, B×N×D, of any float type and any strides, of at
            most :data:`~tdm_lightning.ops.kernels.limits.MOST` patches.
        pairs: accepted proposals, ``0 ≤ pairs ≤ N//2``.
        prefix: number of tokens in front of the patches, which decides what is even.

    Returns:
        The group of every patch in ``0…N-pairs-1``, B×N, int64.
    """
    if features.dtype == torch.float64 or wide(features.dtype):
        features = features.float()
    batch, n, width = features.shape
    group = torch.empty(batch, n, dtype=torch.int64, device=features.device)
    if not group.numel():
        return group
    single = features.dtype == torch.float32
    with torch.cuda.device_of(features):
        _match_alternating[(batch,)](
            features,
            group,
            scratch(features, 1, torch.float32),
            scratch(features, 2, torch.int32),
            n,
            width,
            pairs,
            prefix % 2,
            *features.stride(),
            ROWS=_ROWS,
            COLS=min(_COLUMNS, columns(n // 2)),
            CHUNK=32 if single else 64,
            RANKED=ROWS,
            WIDE=columns(n // 2),
            WHOLE=whole(n),
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return group


@triton.jit(do_not_specialize=["n", "pairs", "first"])
def _match_alternating(
    x: tl.tensor,
    group: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    pairs: tl.tensor,
    first: tl.tensor,
    batch_stride: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANKED: tl.constexpr,
    WIDE: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """One program: one image, its N/2 × N/2 similarities and all that follows from them."""
    image = tl.program_id(0).to(tl.int64)
    x += image * batch_stride
    group += image * n
    keys = floats + image * n
    partner = ints + image * 2 * n
    gone = partner + n
    evens = (n + 1 - first) // 2
    odds = n - evens

    for start in range(0, evens, ROWS):
        even = start + tl.arange(0, ROWS)
        rows = x + (2 * even + first)[:, None].to(tl.int64) * row_stride
        least = tl.full([ROWS], float("inf"), tl.float32)
        at = tl.zeros([ROWS], tl.int32)
        for other in range(0, odds, COLS):
            odd = other + tl.arange(0, COLS)
            cols = x + (2 * odd + 1 - first)[:, None].to(tl.int64) * row_stride
            cosine = _cosines(rows, even < evens, cols, odd < odds, width, stride, CHUNK)
            cost = tl.where((odd < odds)[None, :], finite(-cosine), float("inf"))
            least, at = cheapest(cost, other, least, at)
        tl.store(keys + even, least, mask=even < evens)
        tl.store(partner + even, at, mask=even < evens)
    tl.debug_barrier()

    for start in range(0, evens, RANKED):
        proposal = start + tl.arange(0, RANKED)
        taken = ranks(keys, evens, proposal, WIDE) < pairs
        tl.store(gone + proposal, taken.to(tl.int32), mask=proposal < evens)
    tl.debug_barrier()

    half = tl.arange(0, WHOLE)
    is_even = half < evens
    accepted = tl.load(gone + half, mask=is_even, other=1)
    slot = tl.cumsum(1 - accepted, 0) - 1  # of the even ones that stay
    staying = evens - pairs
    taker = tl.load(partner + half, mask=is_even, other=0) + staying
    tl.store(group + 2 * half + first, tl.where(accepted == 1, taker, slot), mask=is_even)
    tl.store(group + 2 * half + 1 - first, half + staying, mask=half < odds)


@triton.jit
def _cosines(
    rows: tl.tensor,
    row_mask: tl.tensor,
    columns: tl.tensor,
    column_mask: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """Cosines of tokens, R×C, given pointers to where they begin, R×1 and C×1."""
    inner = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    row_squares = tl.zeros([rows.shape[0]], tl.float32)
    column_squares = tl.zeros([columns.shape[0]], tl.float32)
    for first in range(0, width, CHUNK):
        part = first + tl.arange(0, CHUNK)
        inside = (part < width)[None, :]
        a = tl.load(rows + part[None, :] * stride, mask=row_mask[:, None] & inside, other=0.0)
        b = tl.load(columns + part[None, :] * stride, mask=column_mask[:, None] & inside, other=0.0)
        inner = tl.dot(a, tl.trans(b), inner, input_precision="ieee")
        row_squares += tl.sum(a.to(tl.float32) * a.to(tl.float32), 1)
        column_squares += tl.sum(b.to(tl.float32) * b.to(tl.float32), 1)
    row_lengths = tl.maximum(tl.sqrt(row_squares), 1e-12)
    column_lengths = tl.maximum(tl.sqrt(column_squares), 1e-12)
    return inner / (row_lengths[:, None] * column_lengths[None, :])
