"""Bipartite matching in both directions, by several criteria together."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.ops.constants import places
from tdm_lightning.ops.precision import full_precision
from tdm_lightning.ops.sums import running_totals


@torch.no_grad()
def match_both_ways(
    x: Tensor,
    importance: Tensor,
    size: Tensor,
    pairs: int,
    prefix: int = 1,
    temperatures: tuple[float, float, float] = (1.0, 20.0, 40.0),
) -> Tensor:
    """Send tokens into ones that are alike, little attended and small (MCTF, Lee et al., CVPR 2024,
    eq. 3 to 6; ``mlvlab/MCTF``).

    The attraction of two tokens is the product of ``((1 + cosine) / 2)``, of ``1 / (a_i·a_j)`` and
    of ``1 / (s_i·s_j)``, each to the power of one over its temperature. Tokens at even positions of
    the sequence propose first, each to the one at an odd position that attracts it most; half of
    the pairs are accepted. Then those at odd positions propose to the even ones that are left, and
    take along what went into them.

    Args:
        x: patch tokens, B×N×C.
        importance: attention that each receives, a, B×N, positive.
        size: patches that each stands for, s, B×N.
        pairs: tokens to merge away, ``1 ≤ pairs ≤ N//2``.
        prefix: tokens in front of the patches, which decides what is even.
        temperatures: of likeness, importance and size.

    Returns:
        The group of every token in ``0…N-pairs-1``, B×N, int64: even ones in their order, then odd
        ones, those that attract most first.
    """
    batch, n, _ = x.shape
    first = (pairs // 2, pairs - pairs // 2)
    place = places(n, x)
    even, odd = place[prefix % 2 :: 2], place[(prefix + 1) % 2 :: 2]
    with full_precision(x.device):
        unit = F.normalize(x.float(), dim=-1)
        alike = unit[:, even] @ unit[:, odd].transpose(1, 2)
    likeness, informative, small = (1 / temperature for temperature in temperatures)
    score = ((alike + 1) / 2).clamp(min=0) ** likeness
    score = score * _weak(importance, even, odd, informative) * _weak(size, even, odd, small)
    here = place.expand(batch, n)
    best, partner = score.max(dim=2)
    chosen = best.topk(first[0], dim=1).indices
    into = here.scatter(1, even[chosen], odd[partner.gather(1, chosen)])
    # What has gone is no target any more.
    gone = into[:, even] != even
    best, partner = score.masked_fill(gone.unsqueeze(2), -torch.inf).max(dim=1)
    rank = best.topk(len(odd), dim=1).indices
    leaves, stays = rank[:, : first[1]], odd[rank[:, first[1] :]]
    into = into.scatter(1, odd[leaves], even[partner.gather(1, leaves)])
    into = into.gather(1, into)
    # Slots: even tokens that stay in their order, then odd ones by rank.
    slot = torch.zeros_like(into)
    slot[:, even] = running_totals(~gone) - 1
    behind = places(stays.shape[1], x) + (len(even) - first[0])
    slot = slot.scatter(1, stays, behind.expand_as(stays))
    return slot.gather(1, into)


def _weak(values: Tensor, even: Tensor, odd: Tensor, power: float) -> Tensor:
    """High where both of a pair have low values, B×E×O, at most 1."""
    inverse = 1 / values.float()
    inverse = inverse / inverse.amax(dim=1, keepdim=True)
    return (inverse[:, even].unsqueeze(2) * inverse[:, odd].unsqueeze(1)) ** power
