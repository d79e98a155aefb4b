"""ToMe: merge the most similar tokens, a few in every block."""

from __future__ import annotations

from tdm_lightning.importance import ClassAttention
from tdm_lightning.mergers import Merger, PairMerger
from tdm_lightning.schedules import FewerPerBlock
from tdm_lightning.strategies.reduction import TokenReduction


class ToMe(TokenReduction):
    """Merges ``r`` tokens in every block, between attention and MLP (Bolya et al., "Token Merging",
    ICLR 2023).

    Patches at even positions of the sequence are matched with patches at odd ones by the cosine of
    their head-averaged keys; the r most similar are merged as means weighted by the number of
    patches they stand for. It needs no training and adds no parameter. The split by position makes
    it the one method here that does not commute with a permutation of the patches.

    Args:
        r: tokens to merge, see :class:`~tdm_lightning.FewerPerBlock`.
        proportional_attention: add ``log(size)`` of each token to the logits of its key, so that a
            token attracts as much attention as the patches it stands for would (eq. 1).
        merger: what merges, by class attention where it goes by importance; ``None``:
            :class:`~tdm_lightning.PairMerger`.

    Raises:
        TypeError, ValueError: if ``r`` is of the wrong kind or negative.
    """

    def __init__(
        self,
        r: int | list[int] | tuple[int, float] = 13,
        proportional_attention: bool = True,
        merger: Merger | None = None,
    ) -> None:
        schedule, own = FewerPerBlock(r), PairMerger(proportional_attention=proportional_attention)
        wanted = frozenset() if merger is None else merger.requires()
        importance = ClassAttention() if "importance" in wanted else None
        super().__init__(importance, schedule, own if merger is None else merger)
        self.r, self.proportional_attention = schedule.r, own.proportional_attention
        self.merger = merger
