"""EViT: keep the attentive tokens and fuse the rest into one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdm_lightning.core.tokens import Reduction, Role
from tdm_lightning.mergers.token_merger import TokenMerger
from tdm_lightning.ops import gather_tokens, inverse_order, rank_order
from tdm_lightning.strategies.attentive import AttentiveStrategy


class EViT(AttentiveStrategy):
    """Keeps the ``ceil(keep_rate·N)`` most attended patch tokens (Liang et al., ICLR 2022;
    ``youweiliang/evit``).

    The rest becomes one token, ``Σ a_j x_j`` over the inattentive ones, *not* divided by ``Σ
    a_j``. It counts as a patch token in later layers: there it may be kept, fused again or dropped.
    DeiT-S at 0.7: 196 → 139 → 99 → 71 tokens with fusion, 138 → 97 → 68 without.

    Args:
        keep_rate: share of the patch tokens that is kept at each reducing layer, in (0, 1].
        layers: reducing blocks, counted from 0.
        fuse: add the fused token; without it the rest is dropped.
        merger: replaces both by the token merger, which leaves exactly ``ceil(keep_rate·N)``
            tokens ("EViT+Ours").

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        keep_rate: float = 0.7,
        layers: Sequence[int] = (3, 6, 9),
        fuse: bool = True,
        merger: TokenMerger | None = None,
    ) -> None:
        super().__init__(keep_rate, layers, merger)
        self.fuse = bool(fuse)

    def reduce(self, x: Tensor, importance: Tensor, keep: int) -> Reduction:
        """Keep the ``keep`` most important tokens in descending order, then the fused token."""
        order = rank_order(importance)
        kept, rest = order[:, :keep], order[:, keep:]
        out = gather_tokens(x, kept)
        if self.fuse:
            weight = importance.gather(1, rest).to(x.dtype).unsqueeze(1)
            out = torch.cat((out, weight @ gather_tokens(x, rest)), dim=1)
        rank = inverse_order(order)
        fate, role = (keep, Role.CLUSTERED) if self.fuse else (-1, Role.DROPPED)
        return Reduction(
            out,
            assignment=torch.where(rank < keep, rank, fate),
            role=torch.where(rank < keep, int(Role.KEPT), int(role)),
        )
