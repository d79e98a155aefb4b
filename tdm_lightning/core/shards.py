"""Weights that several processes hold in shards (FSDP2), for what needs them whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(weight: Any) -> bool:
    """Whether a process holds a part of it only: a ``DTensor``."""
    return hasattr(weight, "full_tensor")


def local(weight: Any) -> Tensor:
    """This process's shard, a view; a weight that is whole as it is."""
    return weight.to_local() if is_sharded(weight) else weight


def local_part(whole: Tensor, weight: Any) -> Tensor:
    """What of a tensor of a weight's shape belongs to :func:`local` of that weight; every process
    has all of ``whole``, so nothing is sent.
    """
    if not is_sharded(weight):
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = weight.device_mesh, weight.placements
    part = distribute_tensor(whole.to(weight.device), mesh, placements, src_data_rank=None)
    return part.to_local()


@contextmanager
def whole(module: nn.Module, write: bool = False) -> Iterator[None]:
    """Inside, the sharded weights of a module are whole on every process.

    All processes must enter. Costs nothing where no weight is sharded.

    Args:
        module: the model, or a part of it.
        write: gather gradients too, and keep what is written to the weights; every process must
            write the same.
    """
    held = [
        (part, name, weight)
        for part in module.modules()
        for name, weight in part.named_parameters(recurse=False)
        if is_sharded(weight)
    ]
    for part, name, weight in held:
        setattr(part, name, _gathered(weight, write))
    try:
        yield
    finally:
        for part, name, weight in held:
            full = getattr(part, name).detach()
            if write:
                with torch.no_grad():
                    local(weight).copy_(local_part(full, weight))
            setattr(part, name, weight)


def _gathered(weight: Any, gradient: bool) -> nn.Parameter:
    full = nn.Parameter(weight.detach().full_tensor(), weight.requires_grad)
    if gradient and weight.grad is not None:
        full.grad = weight.grad.full_tensor()
    return full
