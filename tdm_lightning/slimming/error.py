"""How far features are from what they should be."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def relative_error(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """``‖found - wanted‖ / ‖wanted‖`` over all entries of all batches; where all that is
    wanted is 0, ``‖found‖``.

    >>> import torch
    >>> relative_error([torch.tensor([3.0, 4.0])], [torch.tensor([3.0, 0.0])]).__round__(4)
    1.3333
    """
    off = size = 0.0
    for one, other in zip(found, wanted, strict=True):
        off += (one.double() - other.double()).square().sum().item()
        size += other.double().square().sum().item()
    return (off / (size or 1.0)) ** 0.5
