"""MaMe: spread every other token over those that it is like."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from tdm_lightning.core.checks import check_layers, check_layers_exist, check_number
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.reduction import Seen
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError
from tdm_lightning.ops import spread_weights
from tdm_lightning.ops.precision import full_precision
from tdm_lightning.strategies.base import Strategy


class MaMe(Strategy):
    """Merges by matrix products: every other token is spread over the tokens between that are like
    it (Huo and Li, "MaMe: Matrix-Based Token Merging", CVPR Findings 2026, arXiv 2604.13432;
    ``cominder/mame`` holds no code, so this is a reading).

    How many tokens go depends on the image and the threshold. What is known of the paper here are
    its abstract, its README and summaries: targets and sources, their cosines less a threshold,
    normalised for each source, pruned by the mean of its weights and normalised again; a source
    that is like no target stays; the first eight blocks. A reading: sources are the odd places,
    targets the even ones, between attention and MLP; a source whose targets are all alike keeps its
    weights; a target becomes the mean of itself and what it is given, by weight; a patch is traced
    to the target that got most of it; the threshold; and each image keeps its own tokens, where the
    paper keeps those that any image of the batch needs.

    Args:
        threshold: the cosine from which a token is like another.
        layers: reducing blocks, counted from 0.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    adaptive = True

    def __init__(self, threshold: float = 0.8, layers: Sequence[int] = tuple(range(8))) -> None:
        super().__init__()
        self.threshold = check_number(threshold, "threshold", least=-1)
        if self.threshold > 1:
            raise SettingError(f"threshold is a cosine and lies in [-1, 1], got {threshold!r}")
        self.layers = check_layers(layers)

    def bind(self, vit: nn.Module, info: ModelInfo) -> None:
        """See :meth:`Strategy.bind`.

        Raises:
            ValueError: if the model has no such blocks.
        """
        check_layers_exist(self.layers, info.depth)

    def spares_class_tokens(self) -> bool:
        """See :class:`Strategy`: only patches are merged."""
        return self.keeps_hooks_of(MaMe)

    def after_attention(self, index: int, tokens: Tokens, seen: Seen) -> Tokens:
        """Spread the sources that are like a target."""
        if index not in self.layers or tokens.count < 2:
            return tokens
        x, valid = tokens.patches, tokens.valid_patches
        targets, sources = x[:, ::2], x[:, 1::2]
        with full_precision(x.device):
            unit = F.normalize(x.float(), dim=-1)
            alike = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
            there = valid[:, ::2].unsqueeze(2) & valid[:, 1::2].unsqueeze(1)
            weight = spread_weights(alike.masked_fill(~there, -1.0), self.threshold)
        got = weight.sum(dim=2, keepdim=True)
        mean = (targets + weight.to(x.dtype) @ sources) / (1 + got).to(x.dtype)
        merged = x.clone()
        merged[:, ::2] = mean
        goes = weight.sum(dim=1) > 0
        here = torch.arange(tokens.count, device=x.device).expand(valid.shape)
        into = here.clone()
        into[:, 1::2] = torch.where(goes, 2 * weight.argmax(dim=1), here[:, 1::2])
        tokens = tokens.replace(x=torch.cat((tokens.x[:, : tokens.prefix], merged), dim=1))
        return tokens.packed(index, into == here, joins=into)
