"""PiToMe: merge where many tokens are alike, protect what is unusual."""

from __future__ import annotations

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.mergers import EnergyMerger, Merger
from tdm_lightning.schedules import RateAtBlocks
from tdm_lightning.strategies.reduction import TokenReduction

#: The margin of the first block; it falls linearly to 0 behind the last.
_MARGIN = 0.75


class PiToMe(TokenReduction):
    """Merges tokens of high energy, those that many others are like (Tran et al., "Accelerating
    Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024; ``hchautran/PiToMe``, its
    ViT of image classification).

    Of N patch tokens ``N − floor(N − keep_rate·N)`` leave every block. The margin from which two
    tokens count as alike falls from 0.75 in the first block linearly to 0 behind the last. In the
    first half of the blocks all tokens take part and the most similar pairs are merged; in the
    second only as many as are needed, those of highest energy. It needs no training and adds no
    parameter.

    Args:
        keep_rate: share of the tokens that stays in every block, at least a half.
        proportional_attention: see :class:`~tdm_lightning.Merger`; the official ViT leaves it out.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(self, keep_rate: float = 0.925, proportional_attention: bool = False) -> None:
        own = EnergyMerger(proportional_attention=proportional_attention)
        super().__init__(None, RateAtBlocks(keep_rate, "all"), own)
        self.proportional_attention = own.proportional_attention

    def merger_in(self, index: int, info: ModelInfo) -> Merger:
        """That of the block's margin."""
        margin = _MARGIN - _MARGIN * (index / info.depth)
        return EnergyMerger(margin, 2 * index >= info.depth, self.proportional_attention)
