"""Random: drop tokens whatever they show."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tdm_lightning.core.checks import check_count
from tdm_lightning.core.tokens import Observed, Tokens
from tdm_lightning.strategies.staged import StagedStrategy, keep_best


class Random(StagedStrategy):
    """Drops random patch tokens: the control that every method must beat.

    Same places and counts as :class:`~tdm_lightning.TopK`. In training each image loses other
    tokens each time, drawn by torch's global generator. At inference the choice depends only on
    ``seed``, the layer and a token's position, so that a result can be repeated and no image
    depends on its batch. No parameters, no state.

    Args:
        keep_rate: share of the initial patch tokens that is left after the first reducing layer,
            its square after the second, and so on; in (0, 1].
        layers: reducing blocks, counted from 0.
        seed: which tokens are kept at inference, a non-negative integer.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self, keep_rate: float = 0.7, layers: Sequence[int] = (3, 6, 9), seed: int = 0
    ) -> None:
        super().__init__(keep_rate, layers)
        self.seed = check_count(seed, "seed", least=0)

    def after_attention(self, index: int, tokens: Tokens, observed: Observed) -> Tokens:
        """Drop in the chosen layers."""
        keep = self.to_keep(index, tokens)
        if keep == tokens.count:
            return tokens
        batch, n = tokens.x.shape[0], tokens.count
        if self.training:
            score = torch.rand(batch, n, device=tokens.x.device)
        else:
            score = _scattered(n, self.seed, index, tokens.x.device).expand(batch, -1)
        return tokens.reduced(index, keep_best(tokens.patches, score, keep), score)


def _scattered(n: int, seed: int, index: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) for positions ``0…n-1``, N: an integer hash, because generators break
    graph capture.
    """
    salt = ((seed + 1) * 0x9E3779B1 + (index + 1) * 0x85EBCA6B) & 0xFFFFFFFF
    code = (torch.arange(n, device=device) * 0x01000193 & 0xFFFFFFFF) ^ salt
    for _ in range(2):
        code = ((code ^ (code >> 16)) * 0x045D9F3B) & 0xFFFFFFFF
    return (code ^ (code >> 16)).float() / 2**32
