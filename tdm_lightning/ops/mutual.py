"""Pairs of tokens that are each other's nearest neighbour."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.ops.precision import full_precision


@torch.no_grad()
def mutual_neighbours(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """The token that each token is in a mutual pair with (Ravé et al., "MPM", CVPR 2026 Findings).

    A token's nearest neighbour is the other token of the highest cosine similarity, the first of
    equals; two that are each other's are a pair. A token that is not finite is in none.

    Args:
        x: tokens, B×N×C.
        valid: which of them are no padding, B×N, bool; ``None``: all. Padding is in no pair.

    Returns:
        Positions, B×N, int64: the other one of the pair; a token's own where it is in none.

    >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [1.0, 0.5]]])
    >>> mutual_neighbours(x).tolist()
    [[2, 1, 0, 3]]
    """
    here = torch.arange(x.shape[1], device=x.device)
    if x.shape[1] < 2:
        return here.expand(x.shape[:2])
    with full_precision(x.device):
        unit = F.normalize(x.float(), dim=-1)
        similarity = unit @ unit.transpose(1, 2)
    nobody = here.unsqueeze(0) == here.unsqueeze(1)
    if valid is not None:
        nobody = nobody | ~valid.unsqueeze(1)
    nearest, partner = similarity.masked_fill(nobody, -torch.inf).max(dim=2)
    # Without a candidate at a finite distance, a token is its own; padding is nearest to nobody.
    partner = torch.where(nearest.isfinite(), partner, here)
    return torch.where(partner.gather(1, partner) == here, partner, here)
