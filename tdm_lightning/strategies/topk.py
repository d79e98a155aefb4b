"""Top-K: keep the attentive tokens and drop the rest."""

from __future__ import annotations

from collections.abc import Sequence

from tdm_lightning.core.tokens import Observed, Tokens
from tdm_lightning.strategies.staged import StagedStrategy, keep_best


class TopK(StagedStrategy):
    """Keeps the patch tokens that the class token attends to most (Haurum et al., 2023;
    ``TokenReduction``).

    A control for what the merger and EViT's fused token add: inside each reducing block, between
    attention and MLP, all but ``int(keep_rate^s · N0)`` tokens are dropped at stage s. DeiT-S at
    0.7: 196 → 137 → 96 → 67. No parameters.

    Args:
        keep_rate: share of the initial patch tokens that is left after the first reducing layer,
            its square after the second, and so on; in (0, 1].
        layers: reducing blocks, counted from 0.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(self, keep_rate: float = 0.7, layers: Sequence[int] = (3, 6, 9)) -> None:
        super().__init__(keep_rate, layers)

    def needs(self, index: int) -> frozenset[str]:
        """Importance in the reducing layers."""
        return frozenset({"importance"}) if index in self.layers else frozenset()

    def after_attention(self, index: int, tokens: Tokens, observed: Observed) -> Tokens:
        """Drop in the chosen layers."""
        keep = self.to_keep(index, tokens)
        if keep == tokens.count:
            return tokens
        assert observed.importance is not None
        return tokens.reduced(
            index, keep_best(tokens.patches, observed.importance, keep), observed.importance
        )
