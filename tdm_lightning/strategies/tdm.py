"""TDM: token decoupling and merging."""

from __future__ import annotations

from collections.abc import Sequence

from tdm_lightning.importance import ClassAttention
from tdm_lightning.mergers import Merger, TokenMerger
from tdm_lightning.schedules import RateAtBlocks
from tdm_lightning.strategies.reduction import TokenReduction


class TDM(TokenReduction):
    """Decouples patch tokens by class attention and merges both kinds (Long et al., "Beyond
    Attentive Tokens", CVPR 2023).

    At each reducing layer N patch tokens become exactly ``ceil(keep_rate·N)``: inattentive tokens
    are clustered by density peaks, similar attentive ones are fused, each group into one token
    weighted by attention. No parameters are added. The authors published no model code; where the
    paper is silent the merger's docstring says what we read into it, and what we chose by
    measurement.

    Args:
        keep_rate: share of the patch tokens that leaves each reducing layer, in (0, 1]; 1 is the
            plain model.
        layers: reducing blocks, counted from 0; the paper's 4th, 7th and 10th block are ``(3, 6,
            9)``.
        merger: what merges; ``None``: :class:`~tdm_lightning.TokenMerger` with its defaults.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        layers: Sequence[int] = (3, 6, 9),
        merger: Merger | None = None,
    ) -> None:
        merger = TokenMerger() if merger is None else merger
        super().__init__(ClassAttention(), RateAtBlocks(keep_rate, layers), merger)
