"""ToFu: drop the most similar tokens in early blocks, fuse them in late ones."""

from __future__ import annotations

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.mergers import FusingMerger, Merger
from tdm_lightning.schedules import FewerPerBlock
from tdm_lightning.strategies.reduction import TokenReduction


class ToFu(TokenReduction):
    """Gives up ``r`` tokens in every block, matched as in ToMe (Kim et al., "Token Fusion: Bridging
    the Gap between Token Pruning and Token Merging", WACV 2024; as implemented in
    ``Westlake-AI/OpenToMe``).

    In the first half of the blocks and the one behind it a matched token is dropped; later it is
    fused into its partner, whose norm is that of the longest (see
    :class:`~tdm_lightning.FusingMerger`). Sizes play no part. It needs no training and adds no
    parameter.

    Args:
        r: tokens to give up, see :class:`~tdm_lightning.FewerPerBlock`.

    Raises:
        TypeError, ValueError: if ``r`` is of the wrong kind or negative.
    """

    def __init__(self, r: int | list[int] | tuple[int, float] = 13) -> None:
        super().__init__(None, FewerPerBlock(r), FusingMerger())
        self.r = self.schedule.r

    def merger_in(self, index: int, info: ModelInfo) -> Merger:
        """One that drops, or one that fuses."""
        return FusingMerger(drop=index <= info.depth // 2)
