"""Soft merging: each source is spread over the targets that it is most like."""

from __future__ import annotations

from torch import Tensor

_TINY = 1e-12


def spread_weights(alike: Tensor, threshold: float) -> Tensor:
    """How much of each source goes into each target (MaMe, Huo and Li, CVPR Findings 2026).

    Cosines below the threshold count nothing; what is left of a source is normalised over the
    targets, what lies below its mean is cut off, and the rest normalised again.

    Args:
        alike: cosines of targets and sources, B×T×S.
        threshold: between −1 and 1.

    Returns:
        B×T×S; a source's weights sum to one, or are all zero: it is like no target.

    >>> import torch
    >>> spread_weights(torch.tensor([[[0.9, 0.1], [0.85, 0.2]]]), 0.8)
    tensor([[[1., 0.],
             [0., 0.]]])
    """
    weight = _normalised((alike - threshold).clamp(min=0))
    there = (weight > 0).sum(dim=1, keepdim=True).clamp(min=1)
    mean = weight.sum(dim=1, keepdim=True) / there
    # A single target's weight is its mean: it keeps it.
    refined = (weight - mean).clamp(min=0)
    alone = refined.sum(dim=1, keepdim=True) <= _TINY
    return _normalised(refined.where(~alone, weight))


def _normalised(weight: Tensor) -> Tensor:
    return weight / weight.sum(dim=1, keepdim=True).clamp(min=_TINY)
