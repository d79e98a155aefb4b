"""Tokens of one side join tokens of the other, and what is left is numbered."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_lightning.ops.constants import constant, rows
from tdm_lightning.ops.sums import add_at_, running_totals


def join_sides(chosen: Tensor, partner: Tensor, n: int, first: int, left: int = 0) -> Tensor:
    """The number of every token once some at every other place have joined one of those between.

    Args:
        chosen: those that join, places among the tokens of their side, B×P, int64.
        partner: whom each token of that side would join, a place among those of the other, B×S.
        n: number of tokens N of both sides.
        first: where their side begins, 0 or 1.
        left: counts on from image to image, by so many; 0: each image's tokens are counted from 0.

    Returns:
        Numbers, B×N, int64, in the order of the tokens that are left; one that joined another has
        that one's.

    >>> join_sides(torch.tensor([[1]]), torch.tensor([[0, 0]]), n=4, first=0)
    tensor([[0, 1, 1, 2]])
    """
    batch, pairs = chosen.shape
    number = _ones(batch, n, left, chosen).clone()
    source, target = slice(first, None, 2), slice(1 - first, None, 2)
    less = constant(lambda: torch.full((1, 1), -1, device=chosen.device), chosen, "minus one")
    add_at_(number[:, source], chosen, less.expand(batch, pairs))
    number = running_totals(number)
    number[:, source].scatter_(1, chosen, number[:, target].gather(1, partner.gather(1, chosen)))
    return number


def _ones(batch: int, n: int, left: int, like: Tensor) -> Tensor:
    """What sums up to the numbers of tokens that are all kept, B×N."""

    def make() -> Tensor:
        begin = rows(batch, left, like)
        return torch.cat((begin, torch.ones_like(begin).expand(-1, n - 1)), dim=1)

    return constant(make, like, "ones", batch, n, left)
