"""The most similar pairs are averaged, with the larger norm restored."""

from __future__ import annotations

import torch

from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.mergers.pairing import HalvingMerger, grouped
from tdm_lightning.ops import group_totals, match_alternating, merge_groups, share_group
from tdm_lightning.ops.sums import group_extremes


class FusingMerger(HalvingMerger):
    """Matches as :class:`PairMerger` does, and makes up for what averages lose in length (ToFu, Kim
    et al., "Token Fusion", WACV 2024; as implemented in ``Westlake-AI/OpenToMe``).

    A group becomes its plain mean, times the largest norm of its members, divided by that of the
    one that took the others in. The paper's own formula (MLERP) divides by the norm of the mean.

    Args:
        drop: the tokens that would be taken in are dropped instead.
    """

    reads_sizes = False

    def __init__(self, drop: bool = False) -> None:
        self.drop = bool(drop)

    def requires(self) -> frozenset[str]:
        """Keys."""
        return frozenset({"keys"})

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`."""
        assert seen.keys is not None
        n = seen.x.shape[1]
        group = match_alternating(seen.keys, n - keep, seen.prefix)
        # Even positions of the sequence go into odd ones.
        even = (torch.arange(n, device=group.device) + seen.prefix) % 2 == 0
        taken = share_group(group) & even
        if self.drop:
            kept = merge_groups(seen.x, group, (~taken).to(seen.x.dtype), keep)
            role = torch.where(taken, int(Role.DROPPED), int(Role.KEPT))
            return Reduction(kept, group.masked_fill(taken, -1), role)
        count = group_totals(torch.ones_like(group), group, keep)
        mean = merge_groups(seen.x, group, 1.0 / count.gather(1, group), keep)
        norm = seen.x.float().norm(dim=-1)
        own = group_totals(norm.masked_fill(taken, 0), group, keep)
        largest = group_extremes(norm, group, keep, "amax", 0)
        # Where the one that takes in is a token of zeros, there is no length to go by.
        zero = own == 0
        scale = (largest / own.masked_fill(zero, 1)).masked_fill(zero, 1)
        return grouped(mean * scale.to(mean.dtype).unsqueeze(-1), group)
