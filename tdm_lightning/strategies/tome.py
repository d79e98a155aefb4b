"""ToMe: merge the most similar tokens, a few in every block."""

from __future__ import annotations

from tdm_lightning.errors import SettingError
from tdm_lightning.importance import ClassAttention
from tdm_lightning.mergers import Merger, PairMerger
from tdm_lightning.mergers.base import check_merger
from tdm_lightning.schedules import FewerPerBlock, RateAtBlocks, Schedule
from tdm_lightning.strategies.reduction import TokenReduction


class ToMe(TokenReduction):
    """Merges ``r`` tokens in every block, between attention and MLP (Bolya et al., "Token Merging",
    ICLR 2023).

    Patches at even positions of the sequence are matched with patches at odd ones by the cosine of
    their head-averaged keys; the r most similar are merged as means weighted by the number of
    patches they stand for. It needs no training and adds no parameter. The split by position makes
    it the one method here that does not commute with a permutation of the patches.

    Args:
        r: tokens to merge, see :class:`~tdm_lightning.FewerPerBlock`; ``None``: 13, or what
            ``keep_rate`` says.
        proportional_attention: add ``log(size)`` of each token to the logits of its key, so that a
            token attracts as much attention as the patches it stands for would (eq. 1).
        merger: what merges, by class attention where it goes by importance; ``None``:
            :class:`~tdm_lightning.PairMerger`.
        keep_rate: a constant share of the tokens stays in every block, at least half, in place of
            ``r`` fewer: a schedule that loses less at equal cost, and not the paper's.

    Raises:
        TypeError, ValueError: if ``r`` is of the wrong kind or negative, or given with a
            ``keep_rate``.
    """

    def __init__(
        self,
        r: int | list[int] | tuple[int, float] | None = None,
        proportional_attention: bool = True,
        merger: Merger | None = None,
        keep_rate: float | None = None,
    ) -> None:
        if r is not None and keep_rate is not None:
            raise SettingError(
                f"r={r} and keep_rate={keep_rate} are two schedules; give one of them"
            )
        fewer = FewerPerBlock(13 if r is None else r)
        schedule: Schedule = fewer if keep_rate is None else RateAtBlocks(keep_rate, "all")
        own = PairMerger(proportional_attention=proportional_attention)
        merger = check_merger(merger)
        wanted = frozenset() if merger is None else merger.requires()
        importance = ClassAttention() if "importance" in wanted else None
        super().__init__(importance, schedule, own if merger is None else merger)
        self.r = fewer.r if keep_rate is None else None
        self.proportional_attention = own.proportional_attention
        self.merger = merger

    @property
    def keep_rate(self) -> float | None:  # type: ignore[override]
        """The constant share; ``None`` with ``r``."""
        return getattr(self.schedule, "keep_rate", None)
