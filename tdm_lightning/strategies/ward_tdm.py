"""WardTDM: few blocks, Ward's linkage, several rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tdm_lightning.importance import ClassAttention
from tdm_lightning.mergers import WardMerger
from tdm_lightning.schedules import RateAtBlocks
from tdm_lightning.strategies.reduction import TokenReduction


class WardTDM(TokenReduction):
    """Merges tokens by Ward's linkage, in several rounds of a few blocks. Ours, not of a paper;
    what it owes to TDM is merging for diversity, what to ToMe the bipartite rounds and proportional
    attention.

    At each reducing layer N patch tokens become exactly ``ceil(keep_rate·N)``. No parameters are
    added, and no training is needed.

    Args:
        keep_rate: share of the patch tokens that leaves each reducing layer, in (0, 1]; 1 is the
            plain model.
        layers: reducing blocks, counted from 0, or ``"all"``.
        rounds: of matching in one block, see :class:`~tdm_lightning.WardMerger`.
        protect: share of the tokens that the class token attends to most, which take no part in a
            block. None by measurement: on validation images it gained nothing, nor on cluttered
            scenes (``python -m benchmarks.study --part ward``).

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        layers: Sequence[int] | Literal["all"] = (0, 3, 6, 9),
        rounds: int | None = 4,
        protect: float = 0.0,
    ) -> None:
        merger = WardMerger(rounds, protect)
        importance = ClassAttention() if merger.requires() else None
        super().__init__(importance, RateAtBlocks(keep_rate, layers), merger)
        self.rounds, self.protect = merger.rounds, merger.protect
