"""Soft merging: each source is spread over the targets that it is most like."""

from __future__ import annotations

from torch import Tensor

_TINY = 1e-12
#: Weights that differ by no more are equal but for rounding.
_EQUAL = 1e-6


def spread_weights(alike: Tensor, threshold: float) -> Tensor:
    """How much of each source goes into each target (MaMe, Huo and Li, CVPR Findings 2026).

    The threshold is taken off the cosines, and what is left of a source is normalised over the
    targets; the mean of its weights is taken off those, and the rest normalised again. Where
    nothing is left then, the targets being equal or one alone, the weights stay as they were.

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
    refined = (weight - mean).clamp(min=0)
    alone = refined.sum(dim=1, keepdim=True) <= _EQUAL
    return _normalised(refined.where(~alone, weight))


def _normalised(weight: Tensor) -> Tensor:
    return weight / weight.sum(dim=1, keepdim=True).clamp(min=_TINY)
