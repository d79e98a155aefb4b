"""The schedule of EViT: a few layers keep the tokens that the class token attends to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tdm_lightning.core.checks import check_keep_rate, check_layers, check_layers_exist
from tdm_lightning.core.tokens import Observed, Reduction, Tokens
from tdm_lightning.mergers.token_merger import TokenMerger, check_merger
from tdm_lightning.strategies.base import Strategy


class AttentiveStrategy(Strategy):
    """Between attention and MLP of some blocks, N patch tokens become ``ceil(keep_rate·N)`` by
    their class attention.

    Subclasses say in :meth:`reduce` what becomes of the rest, unless a token merger does.
    """

    def __init__(self, keep_rate: float, layers: Sequence[int], merger: TokenMerger | None) -> None:
        super().__init__()
        self.keep_rate = check_keep_rate(keep_rate)
        self.layers = check_layers(layers)
        self.merger = check_merger(merger)

    def keep_count(self, n: int) -> int:
        """Tokens that are kept of ``n``: ``ceil(keep_rate·n)``, taken literally, with the current
        rate during warm-up.
        """
        return math.ceil(self.annealed(self.keep_rate) * n)

    def bind(self, vit: Any, patches: int) -> None:
        """Check that the layers exist and that the merger finds a split in each.

        Raises:
            ValueError: if a layer is out of range or a split is not feasible.
        """
        check_layers_exist(self.layers, len(vit.blocks))
        for _ in self.layers if self.merger is not None else ():
            keep = self.keep_count(patches)
            if keep < patches:
                self.merger.split(patches, keep)  # type: ignore[union-attr]
            patches = keep

    def needs(self, index: int) -> frozenset[str]:
        """Importance in the reducing layers, and what the merger compares."""
        if index not in self.layers:
            return frozenset()
        return frozenset({"importance"}) | (
            frozenset() if self.merger is None else self.merger.needs()
        )

    def tracks_size(self) -> bool:
        """Only for proportional attention."""
        return self.merger is not None and self.merger.proportional_attention

    def after_attention(self, index: int, tokens: Tokens, observed: Observed) -> Tokens:
        """Reduce in the chosen layers."""
        keep = self.keep_count(tokens.count)
        if index not in self.layers or keep >= tokens.count:
            return tokens
        importance = observed.importance
        assert importance is not None
        if self.merger is None:
            reduction = self.reduce(tokens.patches, importance, keep)
        else:
            reduction = self.merger(
                tokens.patches, importance, keep, self._compared(tokens, observed)
            )
        tokens = tokens.reduced(index, reduction, importance)
        return tokens.with_size_bias() if self.tracks_size() else tokens

    def _compared(self, tokens: Tokens, observed: Observed) -> Tensor | None:
        assert self.merger is not None
        if self.merger.features == "tokens":
            return None
        seen = observed.keys if self.merger.features == "keys" else observed.normed
        assert seen is not None
        return seen[:, tokens.prefix :]

    def reduce(self, x: Tensor, importance: Tensor, keep: int) -> Reduction:
        """Make ``keep`` (or ``keep + 1``) tokens of the patch tokens B×N×C, given their
        importance B×N.
        """
        raise TypeError(
            f"{type(self).__name__} without a merger must say how it reduces tokens: override"
            " reduce()"
        )
