"""MPM: average pairs of tokens that are each other's nearest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tdm_lightning.core.checks import check_layers, check_layers_exist
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.ops import gather_tokens, mutual_pairs
from tdm_lightning.strategies.base import Strategy


class MPM(Strategy):
    """Averages pairs of tokens that are each other's nearest by cosine, before some blocks (Ravé et
    al., "MPM: Mutual Pair Merging for Efficient Vision Transformers", CVPR Findings 2026, arXiv
    2604.05718; no code was published, so this is a reading).

    How many pairs there are depends on the image: at most half of the tokens go, and nothing can be
    set but the blocks. Stated in the paper: cosines of all image tokens, the mutual pairs, their
    plain mean in the place of the first, the blocks. A reading: images of a batch keep their own
    numbers of tokens, the shorter ones padded; sizes play no part.

    Args:
        layers: blocks before which pairs are merged, counted from 0.

    Raises:
        TypeError, ValueError: if they are no such blocks.
    """

    adaptive = True

    def __init__(self, layers: Sequence[int] = (2, 5)) -> None:
        super().__init__()
        self.layers = check_layers(layers)

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """See :meth:`Strategy.bind`.

        Raises:
            ValueError: if the model has no such blocks.
        """
        check_layers_exist(self.layers, info.depth)

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Merge the pairs that there are."""
        if index not in self.layers or tokens.count < 2:
            return tokens
        x = tokens.patches
        into = mutual_pairs(x, tokens.valid_patches)
        here = torch.arange(tokens.count, device=into.device)
        taken = into != here
        # the other of each pair, itself where there is none
        other = here.expand_as(into).scatter(1, into, torch.where(taken, here, into))
        other = torch.where(taken, into, other)
        mean = (x + gather_tokens(x, other)) / 2
        tokens = tokens.replace(x=torch.cat((tokens.x[:, : tokens.prefix], mean), dim=1))
        return tokens.packed(index, ~taken, into=into)
