"""Compile every kernel for a GPU that need not be there, down to its machine code.

A program of its own: it needs a Triton that was imported without its interpreter. Each launcher is
called with tensors on the CPU; where it would launch a kernel, the kernel is only compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tdm_lightning.ops.kernels import (
    alternating,
    attention,
    combine,
    decouple,
    importance,
    inner,
    ward,
)


class _Absent:
    """A driver of one GPU, as far as a compiler asks."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _compile(kernel: Any, grid: Any) -> Callable[..., None]:
    def compiled(*args: Any, **kwargs: Any) -> None:
        found = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        assert found.asm["cubin"]
        print(kernel.fn.__name__, found.metadata.shared)

    return compiled


def every_kernel(dtype: torch.dtype, n: int) -> None:
    """Call each launcher."""
    x, size = torch.zeros(2, n, 96, dtype=dtype), torch.ones(2, n)
    inner.inner_products(x)
    alternating.match_alternating(x, n // 4, 1)
    decouple.decouple(x, size, n // 2, n // 8, n // 8)
    ward.ward_leaders(x, x[..., :32], size, n // 2, 2)
    ward.ward_leaders(x, None, size, n // 2, None)
    group, out = torch.zeros(2, n, dtype=torch.int64), torch.zeros(2, 9, 96, dtype=dtype)
    combine.combine(x, group, size, size, 9)
    combine.backward(x, group, size, out, out)
    q, k, v = heads(dtype, n)
    importance.class_importance(q, k, 0.1, 1, None)
    bias = torch.zeros(2, 1, 1, n)
    attention.attention_by_rows(q, k, v, bias, 0.1)
    rows = torch.zeros(2, n, 3, 32, dtype=dtype)
    attention.backward(q, k, v, bias, 0.1, rows, rows)


def heads(dtype: torch.dtype, n: int) -> tuple[Tensor, ...]:
    """Queries, keys and values, views into one projection."""
    return torch.zeros(2, n, 3, 3, 32, dtype=dtype).permute(2, 0, 3, 1, 4).unbind(0)


if __name__ == "__main__":
    capability, dtype, n = int(sys.argv[1]), getattr(torch, sys.argv[2]), int(sys.argv[3])
    driver.set_active(_Absent(capability))
    JITFunction.__getitem__ = _compile
    every_kernel(dtype, n)
