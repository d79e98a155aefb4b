"""Pairs of tokens that are each other's nearest."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.ops.precision import full_precision


@torch.no_grad()
def mutual_pairs(features: Tensor, valid: Tensor) -> Tensor:
    """Pair tokens that are each other's most similar by cosine (MPM, Ravé et al., CVPR Findings
    2026).

    Args:
        features: B×N×D.
        valid: which of them are no padding, B×N, bool.

    Returns:
        The token that takes each one in, B×N, int64: the first of a pair, itself for all others.

    >>> points = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]])
    >>> mutual_pairs(points, torch.ones(1, 3, dtype=torch.bool))
    tensor([[0, 1, 0]])
    """
    n = features.shape[1]
    here = torch.arange(n, device=features.device)
    with full_precision(features.device):
        unit = F.normalize(features.float(), dim=-1)
        alike = unit @ unit.transpose(1, 2)
    apart = (here.unsqueeze(0) == here.unsqueeze(1)) | ~valid.unsqueeze(1)
    best = alike.masked_fill(apart, -torch.inf).argmax(dim=2)
    mutual = (best.gather(1, best) == here) & valid & valid.gather(1, best) & (best != here)
    return torch.where(mutual & (best < here), best, here)
