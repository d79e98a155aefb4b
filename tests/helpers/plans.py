"""Inputs for the plans' kernels, and what is checked of each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdm_lightning.ops import kernels

#: Below, at and above the sizes of tiles; odd and even.
COUNTS = (1, 2, 3, 7, 16, 65, 196, 257, 300)
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def patches(batch: int, n: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random tokens behind a class token: a view with gaps between images."""
    return torch.randn(batch, n + 1, width).to(dtype)[:, 1:]


def is_grouping(group: Tensor, groups: int) -> bool:
    """Whether every image has each of ``0…groups-1`` and nothing else."""
    wanted = list(range(groups))
    return all(row.unique().tolist() == wanted for row in group)


def check_operator(operation: Any, *args: Any) -> None:
    """The kernel, not what it falls back to, runs eagerly, compiled and through the operator."""
    torch.library.opcheck(operation.op, args)
    ran: list[None] = []
    form: Callable[..., Tensor] = operation.form
    expected = form(*args)

    def counted(*given: Any) -> Tensor:
        ran.append(None)
        return form(*given)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *given: operation(*given), fullgraph=True, backend="aot_eager")
    with kernels.use("triton"):
        assert operation.runs(*args)
        assert torch.equal(compiled(*args), expected)
        operation.form = counted
        try:
            assert torch.equal(operation(*args), expected)
        finally:
            operation.form = form
    assert not ran
