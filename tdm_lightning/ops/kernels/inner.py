"""Inner products of all tokens of an image: what the plans start from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tdm_lightning.ops.kernels.product import wide

#: Of a tile of the result.
_SIDE = 64


def inner_products(x: Tensor) -> Tensor:
    """``x·xᵀ`` of every image, accumulated in float32.

    Products of half-precision numbers are exact there; those of float32 are not shortened.

    Args:
        x: tokens, B×N×D, of any float type and any strides.

    Returns:
        B×N×N, float32.
    """
    if x.dtype == torch.float64 or wide(x.dtype):
        x = x.float()
    batch, n, width = x.shape
    out = torch.empty(batch, n, n, dtype=torch.float32, device=x.device)
    if not out.numel():
        return out
    tiles = triton.cdiv(n, _SIDE)
    chunk = 32 if x.dtype == torch.float32 else 64
    with torch.cuda.device_of(x):
        _inner_products[(batch, tiles, tiles)](
            x, out, n, width, *x.stride(), SIDE=_SIDE, CHUNK=chunk, num_warps=4, num_stages=3
        )
    return out


@triton.jit(do_not_specialize=["n"])
def _inner_products(
    x: tl.tensor,
    out: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    batch_stride: tl.tensor,
    row_stride: tl.tensor,
    stride: tl.tensor,
    SIDE: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program: one tile of one image, SIDE×SIDE products over the whole width."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    column = tl.program_id(2) * SIDE + tl.arange(0, SIDE)
    x += image * batch_stride
    part = tl.arange(0, CHUNK)
    rows = x + row[:, None].to(tl.int64) * row_stride + part[None, :] * stride
    columns = x + column[None, :].to(tl.int64) * row_stride + part[:, None] * stride
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for first in range(0, width, CHUNK):
        inside = part < width - first
        a = tl.load(rows, mask=(row < n)[:, None] & inside[None, :], other=0.0)
        b = tl.load(columns, mask=(column < n)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        rows += CHUNK * stride
        columns += CHUNK * stride
    to = out + image * n * n + row[:, None] * n + column[None, :]
    tl.store(to, total, mask=(row < n)[:, None] & (column < n)[None, :])
