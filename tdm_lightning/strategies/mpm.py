"""MPM: merge the pairs of tokens that are each other's nearest neighbour."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tdm_lightning.core.checks import check_layers, check_layers_exist
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.ops import gather_tokens, mutual_neighbours
from tdm_lightning.strategies.base import Strategy


class MPM(Strategy):
    """Merges mutual nearest neighbours before a few blocks (Ravé et al., "MPM: Mutual Pair Merging
    for Efficient Vision Transformers", CVPR 2026 Findings; ``saulane/MPM``). Needs no training and
    adds no parameter.

    Two patch tokens that are each other's nearest by cosine become their plain mean, in the place
    of the first; all others stay as they are. How many pairs there are depends on the image, at
    most half of its tokens go each time, and there is no rate or threshold to set: only the blocks.
    Class and register tokens take no part, and a merged token attracts no more attention than
    another.

    What an image gives does not depend on its batch: shorter ones are padded, the padding is masked
    and pairs with nobody, as in the official Segmenter; the official code for timm runs image by
    image. The official code copies merged tokens back to all their patches before the head;
    here :meth:`~tdm_lightning.TokenReducedViT.forward_intermediates` does so for dense tasks, and
    pooling heads count each token as many times as it stands for patches, which is the same.

    A reading: where the blocks ask for positions a pair stands as any merged token here does, see
    :meth:`Positions.after <tdm_lightning.core.positions.Positions.after>`; the paper's models do
    not ask.

    Args:
        layers: blocks *before* which pairs are merged, counted from 0.

    Raises:
        TypeError, ValueError: if they are of the wrong kind, negative, repeated or not there.
    """

    adaptive = True

    def __init__(self, layers: Sequence[int] = (2, 5)) -> None:
        super().__init__()
        self.layers = check_layers(layers)

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """Check the layers.

        Raises:
            ValueError: if the model has not so many.
        """
        check_layers_exist(self.layers, info.depth)

    def before_block(self, index: int, tokens: Tokens) -> Tokens:
        """Merge the pairs of each image."""
        if index not in self.layers:
            return tokens
        x = tokens.patches
        partner = mutual_neighbours(x, None if tokens.valid is None else tokens.valid_patches)
        here = torch.arange(tokens.count, device=x.device)
        joins = torch.minimum(partner, here)
        # Half and half, so that a token alone stays exactly what it is; halved first, because half
        # precision may not hold the sum.
        merged = x / 2 + gather_tokens(x, partner) / 2
        tokens = tokens.replace(x=torch.cat((tokens.x[:, : tokens.prefix], merged), dim=1))
        return tokens.packed(index, joins == here, joins=joins)
