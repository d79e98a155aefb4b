"""Pooling after reduction: a token that stands for several patches counts as many times."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over_patches(x: Tensor, size: Tensor) -> Tensor:
    """The mean of tokens B×N×C over the patches that they stand for, ``size``, B×N; B×1×C.

    A token of size 0 is padding and counts nowhere.
    """
    # An image may have lost all of its patches.
    share = size / size.sum(dim=1, keepdim=True).clamp(min=1)
    return (x * share.to(x.dtype).unsqueeze(-1)).sum(dim=1, keepdim=True)


def log_size(size: Tensor, dtype: torch.dtype) -> Tensor:
    """What makes attention pooling see each token as many times as it stands for patches: a bias on
    the logits, B×1×1×N.
    """
    return size.log().to(dtype)[:, None, None, :]
