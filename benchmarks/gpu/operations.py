"""Do the two forms of every operation agree? On what the strategies give them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from benchmarks.gpu.journal import Entry, Task
from benchmarks.gpu.models import SHAPE, small, strategies
from tdm_lightning.ops import kernels
from tdm_lightning.ops.kernels.dispatch import Operation

#: An operation and its arguments.
Call = tuple[Any, tuple[Any, ...]]


def tasks(device: torch.device) -> Iterator[Task]:
    """One task for each operation and kind of arguments that a pass of some strategy gives it, in
    float32 and bfloat16.
    """
    seen: dict[str, Call] = {}
    side = SHAPE["img_size"]
    for strategy in strategies().values():
        model = small(strategy).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            images = torch.randn(4, 3, side, side, device=device, dtype=dtype)
            with torch.no_grad(), kernels.use("torch"), recorded() as calls:
                model.to(dtype)(images)
            for operation, args in calls:
                seen.setdefault(f"{operation.name}{_kind(args)}", (operation, args))
    for what, (operation, args) in seen.items():
        yield {"operation": operation.name, "arguments": what}, partial(_agree, operation, args)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Note the operations that run inside the context, and what they are given."""
    calls: list[Call] = []
    usual = Operation.__call__

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((self, tree_map_only(Tensor, torch.clone, args)))
        return usual(self, *args, **kwargs)

    Operation.__call__ = noted  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        Operation.__call__ = usual  # type: ignore[method-assign]


def _agree(operation: Any, args: tuple[Any, ...]) -> Entry:
    """Forward, and backward where something flows back: the largest difference relative to the
    largest number, and the least share of equal integers.
    """
    found, runs = {}, False
    for form in ("torch", "triton"):
        with kernels.use(form):
            runs = operation.runs(*args)
            found[form] = _results(operation, args)
    gaps, shares = [0.0], [1.0]
    for one, other in zip(found["torch"], found["triton"], strict=True):
        if one.is_floating_point():
            scale = one.abs().max().clamp(min=1e-12)
            gaps.append(((one - other).abs().max() / scale).item())
        else:
            shares.append((one == other).float().mean().item())
    allowed = 1e-5 if args[0].dtype == torch.float32 else 2e-2
    ok = max(gaps) <= allowed and min(shares) > 0.99  # integers: but for near ties
    return {"ok": ok, "kernel ran": runs, "gap": max(gaps), "equal": min(shares)}


def _results(operation: Any, args: tuple[Any, ...]) -> list[Tensor]:
    def ready(x: Tensor) -> Tensor:
        return x.detach().clone().requires_grad_(x.is_floating_point() and operation.differentiable)

    given = tree_map_only(Tensor, ready, args)
    out = [leaf for leaf in tree_leaves(operation(*given)) if isinstance(leaf, Tensor)]
    flowing = [leaf for leaf in out if leaf.requires_grad]
    grads: list[Tensor] = []
    if flowing:
        leaves = [x for x in tree_leaves(given) if isinstance(x, Tensor) and x.requires_grad]
        total = torch.stack([leaf.float().square().sum() for leaf in flowing]).sum()
        got = torch.autograd.grad(total, leaves, allow_unused=True)
        grads = [grad for grad in got if grad is not None]
    return [x.detach().float() if x.is_floating_point() else x for x in (*out, *grads)]


def _kind(args: tuple[Any, ...]) -> str:
    shown = [
        f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}" if isinstance(x, Tensor) else str(x)
        for x in args
    ]
    return f"({', '.join(shown)})"
