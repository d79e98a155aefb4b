"""What the two kernels of Ward's linkage share: features weighted and of unit length, and the cost
of a merge.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tdm_lightning.ops.kernels.parts import finite, lengths


@triton.jit
def measure(
    gram: tl.tensor,
    inner: tl.tensor,
    weight: tl.tensor,
    floats: tl.tensor,
    n: tl.tensor,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
) -> None:
    """Into the four vectors of ``floats``: weights, squared lengths of the weighted features over
    the weights, lengths of the tokens and of the keys.
    """
    place = tl.arange(0, WHOLE)
    inside = place < n
    w = tl.load(weight + place, mask=inside, other=1.0)
    length = lengths(gram, place, n, inside)
    squared = tl.load(gram + place * (n + 1), mask=inside, other=0.0) / (length * length)
    tl.store(floats + 2 * n + place, length, mask=inside)
    if KEYS:
        length = lengths(inner, place, n, inside)
        squared += tl.load(inner + place * (n + 1), mask=inside, other=0.0) / (length * length)
        tl.store(floats + 3 * n + place, length, mask=inside)
    tl.store(floats + place, w, mask=inside)
    tl.store(floats + n + place, w * squared, mask=inside)


@triton.jit
def sums(
    gram: tl.tensor,
    inner: tl.tensor,
    floats: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    n: tl.tensor,
    KEYS: tl.constexpr,
) -> tl.tensor:
    """Inner products of the weighted features of tokens at places R and C, R×C."""
    at = row[:, None] * n + column[None, :]
    real, other = row < n, column < n
    mask = real[:, None] & other[None, :]
    length = tl.load(floats + 2 * n + row, mask=real, other=1.0)[:, None]
    found = tl.load(gram + at, mask=mask, other=0.0)
    found /= length * tl.load(floats + 2 * n + column, mask=other, other=1.0)[None, :]
    if KEYS:
        length = tl.load(floats + 3 * n + row, mask=real, other=1.0)[:, None]
        second = tl.load(inner + at, mask=mask, other=0.0)
        found += second / (
            length * tl.load(floats + 3 * n + column, mask=other, other=1.0)[None, :]
        )
    w = tl.load(floats + row, mask=real, other=1.0)[:, None]
    return found * (w * tl.load(floats + column, mask=other, other=1.0)[None, :])


@triton.jit
def costs(
    inner: tl.tensor, own: tl.tensor, other: tl.tensor, w: tl.tensor, v: tl.tensor
) -> tl.tensor:
    """What merging groups adds to the weighted variance, R×C.

    Args:
        inner: products of their weighted sums, R×C.
        own: squared length of the sums over the weight, R.
        other: likewise, C.
        w: weights, R.
        v: likewise, C.
    """
    w, v = w[:, None], v[None, :]
    return finite((own[:, None] * v + other[None, :] * w - 2 * inner) / (w + v))
