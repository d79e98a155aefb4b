"""The least important tokens go."""

from __future__ import annotations

import torch

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
        rank = inverse_order(order)
        kept = rank < keep
        return Reduction(
            gather_tokens(seen.x, order[:, :keep]),
            assignment=torch.where(kept, rank, -1),
            role=torch.where(kept, int(Role.KEPT), int(Role.DROPPED)),
        )
