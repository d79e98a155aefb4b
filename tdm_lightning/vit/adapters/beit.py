"""``timm.models.beit``: a relative position bias in every block, or one that all share."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Attention, Beit, Block
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.core.positions import Positions
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.ops import linear_weight
from tdm_lightning.vit.adapters.attention import Heads
from tdm_lightning.vit.adapters.parts import ATTENTIONS, BLOCKS, PreNormGamma
from tdm_lightning.vit.adapters.registry import register_adapter
from tdm_lightning.vit.adapters.relative import BiasedAttention
from tdm_lightning.vit.adapters.timm_base import TimmAdapter


class BeitAttention(BiasedAttention):
    """BEiT's ``Attention``: queries and values have a bias, keys none."""

    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`."""
        if attn.q_bias is None:
            qkv = attn.qkv(h)
        else:
            bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            qkv = F.linear(h, linear_weight(attn.qkv), bias)
        q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return Heads(q, k, v, attn.scale, k)

    def table(self, attn: Any, shared: Tensor | None) -> Tensor | None:
        """See :class:`BiasedAttention`."""
        if attn.relative_position_bias_table is None:
            return shared
        own = attn._get_rel_pos_bias()
        return own if shared is None else own + shared


class BeitAdapter(TimmAdapter):
    """``Beit``."""

    def asks_positions(self, vit: Any) -> bool:
        """See :class:`TimmAdapter`."""
        return True

    def embedded(self, vit: Any, images: Tensor) -> tuple[Tensor, Positions | None]:
        """See :class:`TimmAdapter`."""
        x = vit.patch_embed(images)
        x = torch.cat((vit.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if vit.pos_embed is not None:
            x = x + vit.pos_embed
        bias = None if vit.rel_pos_bias is None else vit.rel_pos_bias().unsqueeze(0)
        columns = self.grid(vit, (images.shape[-2], images.shape[-1]))[1]
        return vit.pos_drop(x), Positions(bias=bias, columns=columns)


ATTENTIONS |= {Attention: BeitAttention()}
BLOCKS |= {Block: PreNormGamma()}
register_adapter(Beit, BeitAdapter)
