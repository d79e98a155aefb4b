"""How far a reduced model's answers lie from those of its own unreduced."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def distortion(plain: Tensor, reduced: Tensor, classifies: bool = True) -> Tensor:
    """The distance of each image's answer.

    Args:
        plain: what the unreduced model gives, B×classes or B×features.
        reduced: what the reduced one gives.
        classifies: the answers are logits: the Kullback-Leibler divergence from the unreduced
            model's probabilities, in nats. Otherwise they are features: 1 − cosine.

    Returns:
        B, float32, not negative but for rounding.

    >>> import torch
    >>> distortion(torch.zeros(1, 2), torch.ones(1, 2)).item()
    0.0
    """
    if not classifies:
        return 1 - F.cosine_similarity(plain.float(), reduced.float(), dim=-1)
    target, found = plain.float().log_softmax(dim=-1), reduced.float().log_softmax(dim=-1)
    return (target.exp() * (target - found)).sum(dim=-1)
