"""MCTF: several criteria at once, and the attention of merged tokens from that of their members."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from tdm_lightning.core.checks import check_layers
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError
from tdm_lightning.importance import ReceivedAttention
from tdm_lightning.mergers import CriteriaMerger
from tdm_lightning.mergers.base import check_reduction
from tdm_lightning.schedules import FewerPerBlock, RateAtBlocks, Schedule, SearchSpace
from tdm_lightning.strategies.base import Ahead, Requirements, Strategy
from tdm_lightning.strategies.reduction import TokenReduction

#: Tokens that always stay, the class token included.
_LEAST = 10


class MCTF(TokenReduction):
    """Merges ``r`` tokens in every block but the first, those that are alike, little attended and
    small (Lee et al., "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient
    Vision Transformers", CVPR 2024; ``mlvlab/MCTF``).

    Tokens are merged in front of a block, by the attention that this block pays: its map is
    computed once, and that of the merged tokens is made of it (one-step-ahead attention, section
    3.3). See :class:`~tdm_lightning.CriteriaMerger`. It adds no parameter; its consistency loss is
    left out.

    Args:
        r: tokens to merge, see :class:`~tdm_lightning.FewerPerBlock`; ``None``: 16, or what
            ``keep_rate`` says. At least ten tokens stay, the class token included.
        temperatures: of likeness, importance and size.
        keep_rate: a share of the tokens stays, at least half, in place of ``r`` fewer.
        layers: the merging blocks, counted from 0; ``None``: all but the first, or those of a list
            ``r``. The published fast setting is 0.65 in (3, 6, 9).

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range, or ``r`` is
            given with a ``keep_rate``.
    """

    def __init__(
        self,
        r: int | list[int] | tuple[int, float] | None = None,
        temperatures: tuple[float, float, float] = (1.0, 20.0, 40.0),
        keep_rate: float | None = None,
        layers: Sequence[int] | None = None,
    ) -> None:
        if r is not None and keep_rate is not None:
            raise SettingError(
                f"r={r} and keep_rate={keep_rate} are two schedules; give one of them"
            )
        merger, fewer = CriteriaMerger(temperatures), FewerPerBlock(16 if r is None else r)
        schedule: Schedule = fewer if keep_rate is None else RateAtBlocks(keep_rate, "all")
        super().__init__(ReceivedAttention(), schedule, merger)
        self.r = fewer.r if keep_rate is None else None
        self.temperatures = merger.temperatures
        self._blocks = None if layers is None else check_layers(layers)

    @property
    def keep_rate(self) -> float | None:  # type: ignore[override]
        """The constant share; ``None`` with ``r``."""
        return getattr(self.schedule, "keep_rate", None)

    @property
    def layers(self) -> tuple[int, ...] | None:  # type: ignore[override]
        """The merging blocks; ``None``: all but the first, or those of a list."""
        return self._blocks

    def requires(self) -> Requirements:
        """Sizes, and blocks whose attention can be taken apart."""
        return Requirements(sizes=True, ahead=True)

    def keep_count(self, index: int, count: int, info: ModelInfo) -> int:
        """See :meth:`TokenReduction.keep_count`."""
        free = index > 0 or isinstance(self.r, list)
        if not (free if self._blocks is None else index in self._blocks):
            return count
        least = _LEAST - info.prefix
        return max(min(count, least), super().keep_count(index, count, info))

    def needs(self, index: int, info: ModelInfo) -> frozenset[str]:
        """Nothing behind the attention."""
        return frozenset()

    def ahead(self, index: int, tokens: Tokens) -> Callable[[Tensor], Ahead] | None:
        """See :meth:`Strategy.ahead`."""
        keep = self.keep_count(index, tokens.count, tokens.info)
        return partial(self._merged, index, tokens, keep) if keep < tokens.count else None

    def spares_class_tokens(self) -> bool:
        """See :class:`Strategy`: only patches are merged."""
        return self.keeps_hooks_of(MCTF)

    def after_attention(self, index: int, tokens: Tokens, seen: Seen) -> Tokens:
        """Nothing is left to do."""
        return tokens

    def search_space(self, depth: int, patches: int) -> SearchSpace[Strategy] | None:
        """The keep rates; of ``r`` the number of merges in all, over all blocks but the first, the
        early ones first.
        """
        if self.keep_rate is not None or self._blocks is not None or depth == 1:
            return super().search_space(depth, patches)
        blocks = depth - 1
        most = blocks * (patches // 2)

        def candidate(step: int) -> Strategy:
            each, more = divmod(most + 1 - step, blocks)
            return self.changed(r=[0, *(each + (block < more) for block in range(blocks))])

        return SearchSpace(most + 1, candidate)

    def _merged(self, index: int, tokens: Tokens, keep: int, received: Tensor) -> Ahead:
        importance = received[:, tokens.prefix :]
        seen = Seen(tokens.patches, tokens.size, importance, prefix=tokens.prefix)
        merger: CriteriaMerger = self.reducer  # type: ignore[assignment]
        reduction = merger(seen, keep)
        check_reduction(reduction, seen, keep, merger, index)
        left = tokens.reduced(index, reduction, importance).with_size_bias()
        return Ahead(left, reduction.assignment, merger.shares(seen, reduction.assignment, keep))
