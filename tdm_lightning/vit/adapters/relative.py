"""Relative position biases: timm's modules always take that of the full grid."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from tdm_lightning.core.tokens import Tokens
from tdm_lightning.vit.adapters.parts import AttentionParts


class BiasedAttention(AttentionParts):
    """An attention with a bias for each pair of tokens, looked up by where they stand."""

    native = False

    @abstractmethod
    def table(self, attn: Any, shared: Tensor | None) -> Tensor | None:
        """The bias of an attention on the full grid, 1×H×T0×T0, the model's shared one included."""

    def bias(self, attn: Any, tokens: Tokens) -> Tensor | None:
        """See :class:`AttentionParts`: the tokens' own bias and that of their positions."""
        positions = tokens.positions
        table = self.table(attn, None if positions is None else positions.bias)
        if table is None:
            return tokens.key_bias
        if positions is not None and positions.index is not None:
            index = positions.index
            prefix = torch.arange(tokens.prefix, device=table.device).expand(index.shape[0], -1)
            row = torch.cat((prefix, index + tokens.prefix), dim=1)
            table = table[0][:, row.unsqueeze(2), row.unsqueeze(1)].transpose(0, 1)
        table = table.to(tokens.x.dtype)
        return table if tokens.key_bias is None else table + tokens.key_bias
