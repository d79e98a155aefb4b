"""The least important tokens become one."""

from __future__ import annotations

import torch
from torch import Tensor

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
        ranked = gather_tokens(x, order)
        weight = importance.gather(1, order[:, keep:]).to(x.dtype).unsqueeze(1)
        fused = weight @ ranked[:, keep:]

        def fate() -> tuple[Tensor, Tensor]:
            rank = inverse_order(order)
            role = torch.where(rank < keep, int(Role.KEPT), int(Role.CLUSTERED))
            return rank.clamp(max=keep), role

        out = torch.cat((ranked[:, :keep], fused), dim=1)
        return Reduction.lazily(out, fate)
