"""Bipartite matching of tokens that stand at even and odd positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.ops.precision import full_precision


@torch.no_grad()
def match_alternating(features: Tensor, pairs: int, prefix: int = 1) -> tuple[Tensor, Tensor]:
    """Send the tokens that have the most similar partner into it (Bolya et al., "Token Merging",
    ICLR 2023).

    Patches at even positions of the sequence (the class token is at 0) each propose to their most
    similar patch at an odd position, by cosine; the ``pairs`` best proposals are accepted. Several
    may be accepted by the same patch.

    Args:
        features: what is compared of the patches, B×N×D.
        pairs: accepted proposals, ``0 ≤ pairs ≤ N//2``.
        prefix: number of tokens in front of the patches, which decides what is even.

    Returns:
        The group of every patch in ``0…N-pairs-1``, B×N, int64: even patches that stay, in their
        order, then the odd ones in theirs; and a mask of the patches that share their group, B×N,
        bool.

    >>> keys = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 3.0]]])
    >>> match_alternating(keys, pairs=1)[0]
    tensor([[0, 0, 1]])
    """
    with full_precision(features.device):
        unit = F.normalize(features.float(), dim=-1)
        even, odd = unit[:, prefix % 2 :: 2], unit[:, (prefix + 1) % 2 :: 2]
        best, partner = (even @ odd.transpose(1, 2)).max(dim=-1)
    chosen = best.topk(pairs, dim=1).indices
    goes = torch.zeros_like(best, dtype=torch.bool).scatter(1, chosen, True)
    staying = even.shape[1] - pairs
    group = partner.new_empty(unit.shape[:2])
    group[:, prefix % 2 :: 2] = torch.where(goes, partner + staying, (~goes).cumsum(1) - 1)
    group[:, (prefix + 1) % 2 :: 2] = torch.arange(
        staying, staying + odd.shape[1], device=group.device
    )
    members = torch.zeros_like(group).scatter_add(1, group, torch.ones_like(group))
    return group, members.gather(1, group) > 1
