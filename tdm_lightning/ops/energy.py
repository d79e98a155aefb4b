"""Matching by energy: tokens in large groups of like ones are merged first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.ops.merge import rank_order
from tdm_lightning.ops.precision import full_precision
from tdm_lightning.ops.sides import join_sides


def token_energy(similarity: Tensor, margin: float) -> Tensor:
    """How many tokens each one is like: the mean of ``elu(cosine − margin)`` over all tokens,
    itself included (PiToMe, Tran et al., NeurIPS 2024, eq. 4).

    Args:
        similarity: cosines, B×N×N.
        margin: where a cosine begins to count as alike.

    Returns:
        Energies, B×N; negative for tokens that are unlike all others.

    >>> token_energy(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]), margin=0.5)
    tensor([[0.2500, 0.2500]])
    """
    return F.elu(similarity - margin).mean(dim=-1)


@torch.no_grad()
def match_by_energy(features: Tensor, pairs: int, margin: float, among: int) -> Tensor:
    """Match tokens of high energy (PiToMe; ``hchautran/PiToMe``).

    Of the ``among`` tokens of highest energy those of the ranks 0, 2, … propose, each to its most
    similar one of the ranks 1, 3, …, by cosine; the ``pairs`` best proposals are accepted.

    Args:
        features: what is compared, B×N×D.
        pairs: accepted proposals, ``1 ≤ pairs ≤ among // 2``.
        margin: of :func:`token_energy`.
        among: tokens that take part, at most N; the others are protected.

    Returns:
        The group of every token in ``0…N-pairs-1``, B×N, int64, those of high energy first.
    """
    n = features.shape[1]
    with full_precision(features.device):
        unit = F.normalize(features.float(), dim=-1)
        similarity = unit @ unit.transpose(1, 2)
        order = rank_order(token_energy(similarity, margin))
        sources, targets = order[:, :among:2], order[:, 1:among:2]
        rows = similarity.gather(1, sources.unsqueeze(2).expand(-1, -1, n))
        best, partner = rows.gather(2, targets.unsqueeze(1).expand(-1, sources.shape[1], -1)).max(
            dim=2
        )
    chosen = best.topk(pairs, dim=1).indices
    group = join_sides(chosen, partner, n, first=0)
    return order.scatter(1, order, group)  # of the tokens as they stand
