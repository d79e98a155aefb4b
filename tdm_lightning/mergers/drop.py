"""The least important tokens go."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.mergers.base import Merger
from tdm_lightning.ops import gather_tokens, inverse_order, rank_order


class Drop(Merger):
    """Keeps the most important tokens, best first, and drops the rest."""

    reads_sizes = False

    def requires(self) -> frozenset[str]:
        """Importance."""
        return frozenset({"importance"})

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`."""
        assert seen.importance is not None
        order = rank_order(seen.importance)

        def fate() -> tuple[Tensor, Tensor]:
            rank = inverse_order(order)
            there = rank < keep
            role = torch.where(there, int(Role.KEPT), int(Role.DROPPED))
            return torch.where(there, rank, -1), role

        return Reduction.lazily(gather_tokens(seen.x, order[:, :keep]), fate)
