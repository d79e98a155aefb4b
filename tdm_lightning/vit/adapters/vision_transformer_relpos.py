"""``timm.models.vision_transformer_relpos``: relative positions, no absolute ones."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor

from tdm_lightning.core.positions import Positions
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.vit.adapters.attention import Heads
from tdm_lightning.vit.adapters.parts import ATTENTIONS, BLOCKS, PreNorm, ResPost
from tdm_lightning.vit.adapters.registry import register_adapter
from tdm_lightning.vit.adapters.relative import BiasedAttention
from tdm_lightning.vit.adapters.timm_base import TimmAdapter


class RelativeAttention(BiasedAttention):
    """``RelPosAttention``: a bias from a table or a small network."""

    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`."""
        qkv = attn.qkv(h).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        k = attn.k_norm(k)
        return Heads(attn.q_norm(q), k, v, attn.scale, k)

    def table(self, attn: Any, shared: Tensor | None) -> Tensor | None:
        """See :class:`BiasedAttention`."""
        return shared if attn.rel_pos is None else attn.rel_pos.get_bias()


class RelPosAdapter(TimmAdapter):
    """``VisionTransformerRelPos``."""

    def asks_positions(self, vit: Any) -> bool:
        """See :class:`TimmAdapter`."""
        return True

    def embedded(self, vit: Any, images: Tensor) -> tuple[Tensor, Positions | None]:
        """See :class:`TimmAdapter`."""
        x = vit.patch_embed(images)
        if vit.cls_token is not None:
            x = torch.cat((vit.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        bias = None if vit.shared_rel_pos is None else vit.shared_rel_pos.get_bias()
        columns = self.grid(vit, (images.shape[-2], images.shape[-1]))[1]
        return x, Positions(bias=bias, columns=columns)


ATTENTIONS |= {RelPosAttention: RelativeAttention()}
BLOCKS |= {RelPosBlock: PreNorm(), ResPostRelPosBlock: ResPost()}
register_adapter(VisionTransformerRelPos, RelPosAdapter)
