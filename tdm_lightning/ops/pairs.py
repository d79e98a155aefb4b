"""Pair matching: finds the attentive tokens that say the same thing."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.ops.constants import places
from tdm_lightning.ops.merge import joined
from tdm_lightning.ops.precision import full_precision
from tdm_lightning.ops.sides import join_sides

Matching = Literal["bipartite", "greedy"]


@torch.no_grad()
def match_pairs(x: Tensor, pairs: int, rule: Matching = "bipartite") -> Tensor:
    """Fuse the most similar tokens, one fusion per pair, by cosine similarity.

    Args:
        x: tokens, B×N×C, the most important first.
        pairs: number of fusions P, ``0 ≤ P ≤ N//2``.
        rule: ``"bipartite"`` (Bolya et al., 2023, split by importance rank instead of position):
            even ranks point to their most similar odd rank and the P strongest edges are fused;
            several tokens may fuse into the same one. ``"greedy"``: P times the most similar pair
            of free tokens, always disjoint.

    Returns:
        The group of every token in ``0…N-P-1``, B×N, int64, groups in the order of their most
        important member that was not fused into another.
    """
    batch, n, _ = x.shape
    if not pairs:
        return places(n, x).expand(batch, -1)
    with full_precision(x.device):
        unit = F.normalize(x.float(), dim=-1)
        return _bipartite(unit, pairs) if rule == "bipartite" else joined(_one_to_one(unit, pairs))


def _bipartite(unit: Tensor, pairs: int) -> Tensor:
    """Groups, B×N."""
    best, partner = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(dim=-1)
    return join_sides(best.topk(pairs, dim=1).indices, partner, unit.shape[1], first=0)


def _one_to_one(unit: Tensor, pairs: int) -> Tensor:
    """The token that each token is fused into, B×N."""
    batch, n, _ = unit.shape
    into = places(n, unit).expand(batch, -1)
    similarity = unit @ unit.transpose(1, 2)
    position = places(n, unit)
    itself = position.unsqueeze(0) == position.unsqueeze(1)
    similarity = similarity.masked_fill(itself, -torch.inf)
    for _ in range(pairs):
        flat = similarity.flatten(1).argmax(dim=1, keepdim=True)
        first, second = flat // n, flat % n
        first, second = torch.minimum(first, second), torch.maximum(first, second)
        into = into.scatter(
            1, second, first
        )  # the less important token is fused into the more important one
        taken = (position == first) | (position == second)
        similarity = similarity.masked_fill(taken.unsqueeze(1) | taken.unsqueeze(2), -torch.inf)
    return into
