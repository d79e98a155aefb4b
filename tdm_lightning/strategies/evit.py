"""EViT: keep the attentive tokens and fuse the rest into one."""

from __future__ import annotations

from collections.abc import Sequence

from tdm_lightning.importance import ClassAttention
from tdm_lightning.mergers import Drop, Fuse, Merger
from tdm_lightning.schedules import RateAtBlocks
from tdm_lightning.strategies.reduction import TokenReduction


class EViT(TokenReduction):
    """Keeps the ``ceil(keep_rate·N)`` most attended patch tokens (Liang et al., ICLR 2022;
    ``youweiliang/evit``).

    The rest becomes one token, ``Σ a_j x_j`` over the inattentive ones, *not* divided by ``Σ
    a_j``. It counts as a patch token in later layers: there it may be kept, fused again or dropped.
    DeiT-S at 0.7: 196 → 139 → 99 → 71 tokens with fusion, 138 → 97 → 68 without.

    Args:
        keep_rate: share of the patch tokens that is kept at each reducing layer, in (0, 1].
        layers: reducing blocks, counted from 0.
        fuse: add the fused token; without it the rest is dropped.
        merger: replaces both; any merger leaves exactly ``ceil(keep_rate·N)`` tokens ("EViT+Ours"
            with :class:`~tdm_lightning.TokenMerger`).

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        layers: Sequence[int] = (3, 6, 9),
        fuse: bool = True,
        merger: Merger | None = None,
    ) -> None:
        own = Fuse() if fuse else Drop()
        reducer = own if merger is None else merger
        super().__init__(ClassAttention(), RateAtBlocks(keep_rate, layers), reducer)
        self.fuse, self.merger = bool(fuse), merger
