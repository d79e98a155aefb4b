"""The least important tokens become one."""

from __future__ import annotations

import torch

from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.mergers.base import Merger
from tdm_lightning.ops import gather_tokens, inverse_order, rank_order


class Fuse(Merger):
    """Keeps the most important tokens, best first, and fuses the rest into one token more.

    EViT's (Liang et al., ICLR 2022; ``youweiliang/evit``): the fused token is ``Σ a_j x_j`` over
    the rest, *not* divided by ``Σ a_j``.
    """

    reads_sizes = False

    def requires(self) -> frozenset[str]:
        """Importance."""
        return frozenset({"importance"})

    def leaving(self, keep: int) -> int:
        """The kept ones and the fused token."""
        return keep + 1

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`."""
        x, importance = seen.x, seen.importance
        assert importance is not None
        order = rank_order(importance)
        kept, rest = order[:, :keep], order[:, keep:]
        weight = importance.gather(1, rest).to(x.dtype).unsqueeze(1)
        out = torch.cat((gather_tokens(x, kept), weight @ gather_tokens(x, rest)), dim=1)
        rank = inverse_order(order)
        return Reduction(
            out,
            assignment=rank.clamp(max=keep),
            role=torch.where(rank < keep, int(Role.KEPT), int(Role.CLUSTERED)),
        )
