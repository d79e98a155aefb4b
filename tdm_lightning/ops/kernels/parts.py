"""What the plans' kernels share: ranks, cheapest partners, and the sizes of their tiles.

One program plans for one image. Its vectors (of N numbers) and matrices lie in global memory, which
for one image is the cache, and are read in tiles; ``tl.debug_barrier()`` stands between a write and
a read by other threads of the program. Vectors of all places are read whole: 2,048 numbers at most.

Costs are finite where there is a token and infinite where there is none, so that numbers that are
none (NaN) still lead to valid groups. The first of equal costs wins, everywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Rows of a tile, and the most columns.
ROWS = 16
COLUMNS = 256
#: Of a program; its loops have nothing to prefetch that pays for the registers.
WARPS, STAGES = 8, 1

_LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32


def columns(count: int) -> int:
    """Width of the tiles that span ``count`` columns: one does, up to 256."""
    return max(16, min(COLUMNS, triton.next_power_of_2(max(count, 1))))


def whole(n: int) -> int:
    """Length of a vector that holds all of ``n`` places."""
    return max(16, triton.next_power_of_2(n))


def scratch(like: Tensor, vectors: int, dtype: torch.dtype) -> Tensor:
    """Memory for ``vectors`` vectors of each image; ``like``: B×N×…."""
    batch, n = like.shape[:2]
    return torch.empty(batch, vectors, n, dtype=dtype, device=like.device)


@triton.jit
def finite(cost: tl.tensor) -> tl.tensor:
    """The cost, the largest number in place of one that is infinite or none."""
    return tl.where(cost < _LARGEST, cost, _LARGEST)


@triton.jit
def cheapest(
    cost: tl.tensor, first: tl.tensor, least: tl.tensor, at: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """The least of each row and its column, of a tile and those before it.

    Args:
        cost: the tile, R×C, with a token in its first column.
        first: the place of that column.
        least: of the tiles before it, R; infinite where there was none.
        at: its column, R.
    """
    found, column = tl.min(cost, 1, return_indices=True, return_indices_tie_break_left=True)
    less = found < least
    return tl.where(less, found, least), tl.where(less, first + column, at)


@triton.jit
def ranks(keys: tl.tensor, count: tl.tensor, place: tl.tensor, COLS: tl.constexpr) -> tl.tensor:
    """How many of ``count`` keys come before those at ``place``: smaller ones, and equal ones at a
    lower place. No key may be none (NaN).
    """
    mine = tl.load(keys + place, mask=place < count, other=0.0)[:, None]
    rank = tl.zeros_like(place)
    for first in range(0, count, COLS):
        other = first + tl.arange(0, COLS)
        real = other < count
        key = tl.load(keys + other, mask=real, other=0.0)[None, :]
        before = (key < mine) | ((key == mine) & (other[None, :] < place[:, None]))
        rank += tl.sum((before & real[None, :]).to(tl.int32), 1)
    return rank


@triton.jit
def lengths(gram: tl.tensor, place: tl.tensor, n: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Lengths of tokens from the diagonal of their inner products, as ``F.normalize`` bounds
    them.
    """
    squared = tl.load(gram + place * (n + 1), mask=mask, other=1.0)
    return tl.maximum(tl.sqrt(squared), 1e-12)
