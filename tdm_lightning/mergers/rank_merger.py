"""The least important tokens go into the kept ones that they are most like."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from tdm_lightning.core.checks import check_count
from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.errors import SettingError
from tdm_lightning.mergers.base import Merger
from tdm_lightning.ops import (
    gather_tokens,
    group_totals,
    inverse_order,
    merge_groups,
    rank_order,
)
from tdm_lightning.ops.precision import full_precision

#: The least size that a token is left with: unlike tokens count negatively.
_LEAST = 1e-2


class RankMerger(Merger):
    """Keeps the most important tokens and merges the others into them (DiffRate, Chen et al., ICCV
    2023; ``OpenGVLab/DiffRate``).

    Each token that is not kept goes into the kept one of the highest cosine, between the tokens
    themselves; a group becomes its plain mean. For proportional attention a token that is taken in
    counts as many patches as it stands for, times that cosine, so sizes are no whole numbers here.

    Args:
        drop: so many of the least important tokens are dropped first.
        proportional_attention: see :class:`Merger`.

    Raises:
        TypeError, ValueError: if ``drop`` is no count.
    """

    def __init__(self, drop: int = 0, proportional_attention: bool = True) -> None:
        self.drop = check_count(drop, "drop", least=0)
        self.proportional_attention = bool(proportional_attention)

    def requires(self) -> frozenset[str]:
        """Importance."""
        return frozenset({"importance"})

    def check(self, patches: int, keep: int) -> None:
        """See :meth:`Merger.check`.

        Raises:
            ValueError: if more would be dropped than may go.
        """
        if self.drop > patches - keep:
            raise SettingError(
                f"drop={self.drop} of {patches} tokens leaves fewer than the {keep} asked for; drop"
                f" at most {patches - keep}"
            )

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`; leaves tokens with the most important first."""
        assert seen.size is not None
        assert seen.importance is not None
        order = rank_order(seen.importance)
        batch, n = order.shape
        left = n - self.drop
        kept, others = order[:, :keep], order[:, keep:left]
        with full_precision(seen.x.device):
            unit = F.normalize(seen.x.detach().float(), dim=-1)
            alike = gather_tokens(unit, others) @ gather_tokens(unit, kept).transpose(1, 2)
        best, partner = alike.max(dim=2)
        here = torch.arange(keep, device=order.device).expand(batch, keep)
        gone = here.new_full((batch, self.drop), -1)
        # by rank, then by place
        rank = inverse_order(order)
        assignment = torch.cat((here, partner, gone), dim=1).gather(1, rank)
        counted = torch.cat((torch.ones_like(kept, dtype=best.dtype), best), dim=1)
        counted = F.pad(counted, (0, self.drop)).gather(1, rank) * seen.size
        slot = torch.where(assignment < 0, 0, assignment)
        total = group_totals(counted, slot, keep)
        there = (assignment >= 0).to(counted.dtype)
        members = group_totals(there, slot, keep).gather(1, slot)
        mean = merge_groups(seen.x, slot, there / members, keep)
        shared = members > 1
        role = torch.where(shared, int(Role.MATCHED), int(Role.KEPT))
        role = torch.where(assignment < 0, int(Role.DROPPED), role)
        return Reduction(mean, assignment, role, total.clamp(min=_LEAST))
