"""Top-K: keep the attentive tokens and drop the rest."""

from __future__ import annotations

from collections.abc import Sequence

from tdm_lightning.importance import ClassAttention
from tdm_lightning.mergers import Merger
from tdm_lightning.schedules import RateAtBlocks
from tdm_lightning.strategies.reduction import TokenReduction


class TopK(TokenReduction):
    """Keeps the patch tokens that the class token attends to most (Haurum et al., 2023;
    ``TokenReduction``).

    A control for what the merger and EViT's fused token add: inside each reducing block, between
    attention and MLP, all but ``int(keep_rate^s · N0)`` tokens are dropped at stage s. DeiT-S at
    0.7: 196 → 137 → 96 → 67. No parameters.

    Args:
        keep_rate: share of the initial patch tokens that is left after the first reducing layer,
            its square after the second, and so on; in (0, 1].
        layers: reducing blocks, counted from 0.
        merger: combines tokens instead of dropping them, to as many.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        layers: Sequence[int] = (3, 6, 9),
        merger: Merger | None = None,
    ) -> None:
        super().__init__(ClassAttention(), RateAtBlocks(keep_rate, layers, "initial"), merger)
