"""Importance × schedule × merger: every method of a fixed budget."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.importance import ClassAttention, Importance
from tdm_lightning.mergers import Drop, Merger
from tdm_lightning.mergers.base import WORDS, check_merger, check_reduction
from tdm_lightning.schedules import RateAtBlocks, Schedule, SearchSpace
from tdm_lightning.strategies.base import Requirements, Strategy


class TokenReduction(Strategy):
    """Scores tokens, decides how many stay, and merges: importance × schedule × merger.

    EViT, TopK, Random, TDM, ToMe and DPC-KNN are such triples under their names; this class takes
    any three, in Python or in YAML, so that one part can be exchanged without writing a class.

    Args:
        importance: how much each token matters; ``None``: nothing is known of that.
        schedule: in which blocks tokens are given up, and how many stay; ``None``: seven tenths
            after blocks 3, 6 and 9.
        merger: what the tokens become; ``None``: the least important are dropped.
        before: reduce in front of the blocks, where nothing but the tokens themselves can be seen,
            rather than between their attention and MLP.

    Attributes:
        reducer: the merger that is used: the one given, or the method's own.

    Raises:
        TypeError, ValueError: if a part is of the wrong kind, or must see what there is not.

    >>> from tdm_lightning.mergers import PairMerger
    >>> TokenReduction(None, RateAtBlocks(0.9, "all"), PairMerger()).reducer.requires()
    frozenset({'keys'})
    """

    def __init__(
        self,
        importance: Importance | None = None,
        schedule: Schedule | None = None,
        merger: Merger | None = None,
        before: bool = False,
    ) -> None:
        super().__init__()
        if importance is None and merger is None:
            importance = ClassAttention()
        self.importance = _checked(importance, Importance, "importance")
        self.schedule: Any = _checked(schedule, Schedule, "schedule") or RateAtBlocks()
        self.before = bool(before)
        self.merger = check_merger(merger, {"importance"} if self.before else WORDS)
        self.reducer: Merger = Drop() if self.merger is None else self.merger
        if self.before and importance is not None and importance.requires():
            raise SettingError(
                f"before a block there is no attention to see, and {importance!r} goes by it; take"
                " Chance() or None, or set before=False"
            )

    @property
    def keep_rate(self) -> float:
        """That of the schedule; no attribute where it has none."""
        return self.schedule.keep_rate

    @property
    def layers(self) -> tuple[int, ...]:
        """The reducing blocks of the schedule; no attribute where it has no choice of them."""
        return self.schedule.layers

    @property
    def scores_tokens(self) -> bool:
        """Whether :meth:`score_tokens` says how much each token matters."""
        return self.importance is not None

    def requires(self) -> Requirements:
        """Sizes, where the merger reads them."""
        merger = self.reducer
        return Requirements(sizes=merger.reads_sizes or merger.proportional_attention)

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Check schedule and merger against the model.

        Raises:
            ValueError: if the schedule does not fit it, the merger cannot make so many tokens, or
                it goes by importance and there is none.
        """
        if "importance" in self.reducer.requires() and not self.scores_tokens:
            raise SettingError(
                f"{self.reducer!r} goes by importance, and there is none; set importance, for"
                " example to ClassAttention()"
            )
        self.schedule.check(info)
        count = info.patches
        for index in range(info.depth):
            keep = self.keep_count(index, count, info)
            if keep < count:
                merger = self.merger_in(index, info)
                merger.check(count, keep)
                count = min(count, merger.leaving(keep))

    def merger_in(self, index: int, info: ModelInfo) -> Merger:
        """The merger of block ``index``, for methods that merge in another way from block to block;
        it asks for the same as :attr:`reducer`.
        """
        return self.reducer

    def keep_count(self, index: int, count: int, info: ModelInfo) -> int:
        """How many of ``count`` tokens stay in block ``index``, with the current rate."""
        return self.schedule.keep(index, count, info, self.current_keep_rate)

    def needs(self, index: int, info: ModelInfo) -> frozenset[str]:
        """What importance and merger must see, in the reducing blocks."""
        if self.before or not self.schedule.reduces(index, info.depth):
            return frozenset()
        words = frozenset() if self.importance is None else self.importance.requires()
        own = self.reducer.requires() | self.reducer.prefers()
        return words | (own - {"importance"})

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Reduce, where that comes before the block."""
        return self._reduced(index, tokens, None) if self.before else tokens

    def after_attention(self, index: int, tokens: Tokens, seen: Seen) -> Tokens:
        """Reduce, where that comes inside the block."""
        return tokens if self.before else self._reduced(index, tokens, seen)

    def spares_class_tokens(self) -> bool:
        """See :class:`Strategy`: only patches are merged."""
        return self.keeps_hooks_of(TokenReduction)

    def score_tokens(self, index: int, seen: Seen) -> Tensor | None:
        """How much each token matters, B×N; ``None``: nothing is known of that."""
        if self.importance is None:
            return None
        return self.importance(seen, index, self.training)

    def _reduced(self, index: int, tokens: Tokens, seen: Seen | None) -> Tokens:
        keep = self.keep_count(index, tokens.count, tokens.info)
        if keep >= tokens.count:
            return tokens
        merger = self.merger_in(index, tokens.info)
        seen = tokens.seen() if seen is None else seen
        score = self.score_tokens(index, seen)
        seen = Seen(seen.x, tokens.size, score, seen.keys, seen.normed, seen.prefix)
        reduction = merger(seen, keep)
        check_reduction(reduction, seen, keep, merger, index)
        tokens = tokens.reduced(index, reduction, score)
        return tokens.with_size_bias() if merger.proportional_attention else tokens

    def search_space(self, depth: int, patches: int) -> SearchSpace[Strategy] | None:
        """Those of the schedule."""
        found = self.schedule.search_space(depth, patches)
        return None if found is None else found.map(self._with)

    def _with(self, schedule: Schedule) -> Strategy:
        """The same method on another schedule of this kind."""
        own, given = self.config()["init_args"], schedule.config()
        if "schedule" in own:
            return self.changed(schedule=given)
        return self.changed(**{k: v for k, v in given["init_args"].items() if k in own})


def _checked(part: Any, kind: type, name: str) -> Any:
    if part is not None and not isinstance(part, kind):
        raise SettingTypeError(
            f"{name} must be of class {kind.__name__}, got {part!r} of type {type(part).__name__}"
        )
    return part
