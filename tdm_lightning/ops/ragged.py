"""Sequences of different lengths in one batch: each image keeps its own tokens, the shorter ones
are padded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pack(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where the kept tokens of each image lie, in their order, padded to the longest image.

    The length depends on the values, so this waits for the device and cannot be exported.

    Args:
        kept: tokens to keep, B×N, bool.

    Returns:
        Positions, B×L, int64, with L the largest number of kept tokens (perhaps 0); and which of
        them are real, B×L, bool. The positions that pad an image are those of tokens that it did
        not keep.

    >>> index, valid = pack(torch.tensor([[True, False, True], [False, True, False]]))
    >>> index.tolist(), valid.tolist()
    ([[0, 2], [1, 0]], [[True, True], [True, False]])
    """
    counts = kept.sum(dim=1, keepdim=True)
    longest = int(counts.max()) if kept.numel() else 0
    order = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return order[:, :longest], torch.arange(longest, device=kept.device) < counts
