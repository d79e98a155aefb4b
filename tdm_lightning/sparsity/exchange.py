"""Which parts of a layer make room for others."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def death_rate(step: int, total_steps: int, first: float = 0.5, last: float = 0.005) -> float:
    """Share of the active parts that an exchange removes: a cosine from ``first`` at step 0 to
    ``last`` at the end.

    >>> [round(death_rate(step, 100), 4) for step in (0, 50, 100)]
    [0.5, 0.2525, 0.005]
    """
    return last + (first - last) * (1 + math.cos(math.pi * step / total_steps)) / 2


def exchange(
    active: Tensor, worth: Tensor, promise: Tensor, rate: float, readmit: bool = False
) -> Tensor:
    """Remove the ``ceil(rate · active)`` active parts of least worth, and let as many inactive
    ones of most promise in.

    The number of active parts stays. What is NaN or infinite, after an overflow, counts as 0.

    Args:
        active: n, bool.
        worth: n, what each active part is worth.
        promise: n, what is expected of each inactive one.
        rate: share of the active parts to remove, in [0, 1].
        readmit: whether the removed ones compete for their places too, as in RigL. If not, every
            exchange brings in others, and no more are removed than there are others.

    Returns:
        The new mask, n, bool.
    """
    count = math.ceil(rate * int(active.sum()))
    if not readmit:
        count = min(count, int((~active).sum()))
    worth, promise = (
        torch.nan_to_num(score.float(), nan=0.0, posinf=0.0, neginf=0.0)
        for score in (worth, promise)
    )
    kept = active.clone()
    kept[worth.masked_fill(~active, torch.inf).topk(count, largest=False).indices] = False
    outside = ~kept if readmit else ~active
    kept[promise.masked_fill(~outside, -torch.inf).topk(count).indices] = True
    return kept


def draw(size: int, count: int, generator: torch.Generator) -> Tensor:
    """A mask of ``size`` parts with ``count`` active ones, chosen at random, bool."""
    mask = torch.zeros(size, dtype=torch.bool, device="cpu")
    mask[torch.randperm(size, generator=generator, device="cpu")[:count]] = True
    return mask
