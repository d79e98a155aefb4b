"""Bipartite matching of tokens that stand at even and odd positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.ops.constants import constant, places
from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tdm_lightning.ops.kernels.limits import too_many
from tdm_lightning.ops.precision import full_precision
from tdm_lightning.ops.sums import add_at_


@torch.no_grad()
def match_alternating(features: Tensor, pairs: int, prefix: int = 1) -> Tensor:
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
        order, then the odd ones in theirs.

    >>> keys = torch.tensor([[[1.0, 0.0], [2.0, 0.1], [0.0, 3.0]]])
    >>> match_alternating(keys, pairs=1)
    tensor([[0, 0, 1]])
    """
    return alternating_groups(features, pairs, prefix)


@in_two_forms(
    "tdm_lightning.ops.kernels.alternating:match_alternating",
    lambda features, pairs, prefix: too_many(features.shape[1]),
)
def alternating_groups(features: Tensor, pairs: int, prefix: int) -> Tensor:
    """:func:`match_alternating` in two forms."""
    batch, n, _ = features.shape
    first = prefix % 2  # of the even ones
    with full_precision(features.device):
        unit = F.normalize(features.float(), dim=-1)
        best, partner = (unit[:, first::2] @ unit[:, 1 - first :: 2].transpose(1, 2)).max(dim=-1)
    order = best.topk(best.shape[1], dim=1).indices
    chosen = order[:, :pairs]
    stays = order[:, pairs:].sort(dim=1).values
    staying = stays.shape[1]
    # Slots of the odd ones follow those of the even ones that stay; the first of them is what the
    # slot of an even one's partner is counted from.
    slots = constant(
        lambda: _slots(n, first, staying, features), features, "slots", n, first, staying
    )
    group = slots.repeat(batch, 1)
    even = group[:, first::2]
    even.scatter_(1, stays, places(staying, features).expand(batch, -1))
    add_at_(even, chosen, partner.gather(1, chosen))
    return group


def _slots(n: int, first: int, staying: int, like: Tensor) -> Tensor:
    slots = places(n, like) // 2 + staying
    slots[first::2] = staying
    return slots
