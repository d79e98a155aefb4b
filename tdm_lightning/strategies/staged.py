"""The schedule of DynamicViT and its kin: shares of the initial tokens, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tdm_lightning.core.checks import check_keep_rate, check_layers, check_layers_exist
from tdm_lightning.core.tokens import Reduction, Role, Tokens
from tdm_lightning.errors import SettingError
from tdm_lightning.ops import gather_tokens, inverse_order, rank_order
from tdm_lightning.strategies.base import Strategy


class StagedStrategy(Strategy):
    """After the s-th of some layers, ``int(keep_rate^s · N0)`` tokens are left of the N0 initial
    ones.
    """

    def __init__(self, keep_rate: float, layers: Sequence[int]) -> None:
        super().__init__()
        self.keep_rate = check_keep_rate(keep_rate)
        self.layers = check_layers(layers)

    def keep_count(self, stage: int, initial: int) -> int:
        """Tokens left after ``stage`` (from 1) of ``initial``; rounded down, and always of the
        initial number.

        Raises:
            ValueError: if none is left.
        """
        rate = self.annealed(self.keep_rate)
        keep = int(initial * rate**stage)
        if keep < 1:
            raise SettingError(
                f"keep_rate={rate} leaves no token at layer {self.layers[stage - 1]}:"
                f" int({initial}·{rate}^{stage}) = 0; raise the keep rate or reduce in fewer layers"
            )
        return keep

    def bind(self, vit: Any, patches: int) -> None:
        """Check that the layers exist and that each leaves a token.

        Raises:
            ValueError: if a layer is out of range, or none is left.
        """
        check_layers_exist(self.layers, len(vit.blocks))
        for stage in range(1, len(self.layers) + 1):
            self.keep_count(stage, patches)

    def begin(self, tokens: Tokens) -> Tokens:
        """Note how many tokens there are at first."""
        return tokens.carrying(initial=tokens.count)

    def to_keep(self, index: int, tokens: Tokens) -> int:
        """How many of the present tokens leave block ``index``'s reduction; all of them where it
        does not reduce.
        """
        if index not in self.layers:
            return tokens.count
        return min(
            tokens.count, self.keep_count(self.layers.index(index) + 1, tokens.carry["initial"])
        )


def keep_best(x: Tensor, score: Tensor, keep: int) -> Reduction:
    """Keep the ``keep`` tokens of B×N×C with the highest scores, B×N, best first, and drop the
    rest.
    """
    order = rank_order(score)
    rank = inverse_order(order)
    kept = rank < keep
    return Reduction(
        gather_tokens(x, order[:, :keep]),
        assignment=torch.where(kept, rank, -1),
        role=torch.where(kept, int(Role.KEPT), int(Role.DROPPED)),
    )
