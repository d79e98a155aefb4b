"""Random: drop tokens whatever they show."""

from __future__ import annotations

from collections.abc import Sequence

from tdm_lightning.importance import Chance
from tdm_lightning.mergers import Merger
from tdm_lightning.schedules import RateAtBlocks
from tdm_lightning.strategies.reduction import TokenReduction


class Random(TokenReduction):
    """Drops random patch tokens: the control that every method must beat.

    Same places and counts as :class:`~tdm_lightning.TopK`. In training each image loses other
    tokens each time, drawn by torch's global generator. At inference the choice depends only on
    ``seed``, the layer and a token's position, so that a result can be repeated and no image
    depends on its batch. No parameters, no state.

    Args:
        keep_rate: share of the initial patch tokens that is left after the first reducing layer,
            its square after the second, and so on; in (0, 1].
        layers: reducing blocks, counted from 0.
        seed: which tokens are kept at inference, a non-negative integer.
        merger: combines tokens instead of dropping them, to as many.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        layers: Sequence[int] = (3, 6, 9),
        seed: int = 0,
        merger: Merger | None = None,
    ) -> None:
        chance = Chance(seed)
        super().__init__(chance, RateAtBlocks(keep_rate, layers, "initial"), merger)
        self.seed = chance.seed
