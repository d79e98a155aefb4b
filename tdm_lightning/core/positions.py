"""Where tokens stand, for models whose blocks ask."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tdm_lightning.core.reduction import Reduction
from tdm_lightning.ops import first_members, mean_positions, rank_order


@dataclass(frozen=True)
class Positions:
    """Where tokens stand on the grid of all N0 patches, and the tables that blocks look that up in.

    Attributes:
        rope: rotary embeddings, one per block, each N0×D or H×N0×D; empty without RoPE.
        bias: relative position bias that all blocks share, 1×H×T0×T0; each block may add its own.
        columns: width of the grid where merged tokens stand in the middle of their patches, see
            :meth:`after`; otherwise ``None``.
        index: the original patch in whose position each token stands, B×N, int64; ``None``: every
            patch is still in its own.
    """

    rope: tuple[Tensor, ...] = ()
    bias: Tensor | None = None
    columns: int | None = None
    index: Tensor | None = None

    def after(
        self, reduction: Reduction, importance: Tensor | None, size: Tensor | None
    ) -> Positions:
        """The positions of the tokens that leave a reduction.

        Where a merged token stands was chosen by measurement (``benchmarks/positions``). Under
        rotary positions it takes the position of its most important member, or of its first where
        there is no importance: the patch nearest to the mean of its patches cost up to 30 points of
        accuracy. Under a relative position bias that mean was ahead by up to 5 points, so it is
        taken.

        Args:
            reduction: from N tokens to M.
            importance: of the entering tokens, B×N.
            size: patches that each of them stands for, B×N; needed where ``columns`` is set.
        """
        chosen, group, groups = reduction.position, reduction.assignment, reduction.x.shape[1]
        if chosen is None and self.columns is not None:
            assert size is not None
            index = self.index
            if index is None:
                index = torch.arange(group.shape[1], device=group.device).expand_as(group)
            return replace(self, index=mean_positions(group, groups, index, size, self.columns))
        if chosen is None:
            order = None if importance is None else rank_order(importance)
            chosen = first_members(group, groups, order)
        return replace(self, index=chosen if self.index is None else self.index.gather(1, chosen))
