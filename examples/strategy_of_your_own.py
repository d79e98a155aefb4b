"""A strategy of one's own: keep the patches of largest norm after one block.

PYTHONPATH=examples tdm fit --config quickstart --model.strategy strategy_of_your_own.LargestNorm
"""

import torch

import tdm_lightning as tdm
from tdm_lightning.ops import gather_tokens, inverse_order, rank_order


class LargestNorm(tdm.Strategy):
    """Keeps a share of the patch tokens by their norm.

    Args:
        keep_rate: the share, in (0, 1].
        layer: the block, from 0.
    """

    def __init__(self, keep_rate: float = 0.5, layer: int = 5) -> None:
        super().__init__()
        self.keep_rate, self.layer = keep_rate, layer

    def after_block(self, index, tokens):
        keep = max(1, int(self.annealed(self.keep_rate) * tokens.count))
        if index != self.layer or keep == tokens.count:
            return tokens
        norm = tokens.patches.norm(dim=-1)
        order = rank_order(norm)
        rank = inverse_order(order)
        kept = rank < keep
        role = torch.where(kept, int(tdm.Role.KEPT), int(tdm.Role.DROPPED))
        x = gather_tokens(tokens.patches, order[:, :keep])
        return tokens.reduced(index, tdm.Reduction(x, torch.where(kept, rank, -1), role), norm)
