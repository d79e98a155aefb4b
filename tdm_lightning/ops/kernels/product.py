"""A matrix product in a kernel, with float32 sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tdm_lightning.ops.kernels.choice import interpreted


def wide(dtype: torch.dtype) -> bool:
    """What :func:`product` needs to know: Triton's interpreter multiplies the bits of bfloat16."""
    return interpreted() and dtype == torch.bfloat16


@triton.jit
def product(a: tl.tensor, b: tl.tensor, sums: tl.tensor, WIDE: tl.constexpr) -> tl.tensor:
    """``a·b + sums``; float32 factors are not shortened.

    Args:
        a: R×S.
        b: S×C, of the same type.
        sums: R×C, float32.
        WIDE: see :func:`wide`.
    """
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")
