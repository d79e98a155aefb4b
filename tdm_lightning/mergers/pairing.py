"""What mergers that pair tokens in two sets have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.errors import SettingError
from tdm_lightning.mergers.base import Merger
from tdm_lightning.ops import combine, share_group


class HalvingMerger(Merger):
    """A merger that pairs tokens of two sets once: half of them go at most."""

    def check(self, patches: int, keep: int) -> None:
        """See :meth:`Merger.check`.

        Raises:
            ValueError: if more than half would have to go.
        """
        if patches - keep > patches // 2:
            raise SettingError(
                f"matching in two sets leaves at least {patches - patches // 2} of {patches} tokens"
                f" in one block, and {keep} are asked for; raise the keep rate or reduce in more"
                " blocks"
            )


def means_of_patches(seen: Seen, group: Tensor, groups: int) -> Reduction:
    """Every group becomes the mean of the patches that its tokens stand for.

    Args:
        seen: the N tokens.
        group: the group of each in ``0…groups-1``, B×N, int64.
        groups: number of groups.
    """
    assert seen.size is not None
    merged, total = combine(seen.x, group, None, seen.size, groups)
    return grouped(merged, group, total)


def grouped(x: Tensor, group: Tensor, size: Tensor | None = None) -> Reduction:
    """The reduction to groups ``x``, B×M×C, in which nothing is dropped; the tokens that share
    theirs are matched.
    """

    def fate() -> tuple[Tensor, Tensor]:
        return group, torch.where(share_group(group), int(Role.MATCHED), int(Role.KEPT))

    return Reduction.lazily(x, fate, size)
