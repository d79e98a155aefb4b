"""``timm.models.eva``: EVA-02, DINOv3, Perception Encoder; rotary positions (RoPE)."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.attention import AttentionRope
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.core.positions import Positions
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.ops import linear_weight
from tdm_lightning.ops.linear import is_quantized
from tdm_lightning.vit.adapters.attention import Heads
from tdm_lightning.vit.adapters.parts import (
    ATTENTIONS,
    BLOCKS,
    AttentionParts,
    PreNormGamma,
    ResPost,
)
from tdm_lightning.vit.adapters.registry import register_adapter
from tdm_lightning.vit.adapters.timm_base import TimmAdapter


class RotaryAttention(AttentionParts):
    """``EvaAttention`` and ``AttentionRope``: queries and keys of patches are rotated."""

    def run(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Tensor:
        """See :class:`AttentionParts`."""
        _check_quantized(attn)
        return attn(h, rope=rotation(tokens, index), attn_mask=tokens.key_bias)

    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`."""
        _check_quantized(attn)
        q, k, v = _projected(attn, h)
        q, k = attn.q_norm(q), attn.k_norm(k)
        content = k
        rope = rotation(tokens, index)
        if rope is not None:
            q, k = (_rotated(attn, part, rope).type_as(v) for part in (q, k))
        groups = getattr(attn, "num_kv_groups", 1)
        if groups > 1:  # several heads share a key and a value
            k, v, content = (part.repeat_interleave(groups, dim=1) for part in (k, v, content))
        return Heads(q, k, v, attn.scale, content)


def rotation(tokens: Tokens, index: int) -> Tensor | None:
    """Rotary embeddings of the patch tokens in a block, broadcast to B×H×N×D; ``None`` in models
    without.
    """
    positions = tokens.positions
    if positions is None or not positions.rope:
        return None
    table = positions.rope[index]
    if positions.index is None:
        return table
    if table.ndim == 2:
        return table[positions.index].unsqueeze(1)
    return table[:, positions.index].transpose(0, 1)


def _rotated(attn: Any, x: Tensor, rope: Tensor) -> Tensor:
    """Queries or keys B×H×T×d, those of the patches rotated."""
    first, half = attn.num_prefix_tokens, getattr(attn, "rotate_half", False)
    patches = apply_rot_embed_cat(x[:, :, first:], rope, half=half)
    return torch.cat((x[:, :, :first], patches), dim=2)


def _projected(attn: Any, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, B×H×T×d; keys and values of fewer heads where some share them."""
    if attn.qkv is None:
        parts = [project(h) for project in (attn.q_proj, attn.k_proj, attn.v_proj)]
        heads = [attn.num_heads] + [getattr(attn, "num_kv_heads", attn.num_heads)] * 2
        q, k, v = (
            part.unflatten(-1, (count, -1)).transpose(1, 2)
            for part, count in zip(parts, heads, strict=True)
        )
        return q, k, v
    if getattr(attn, "q_bias", None) is None:
        qkv = attn.qkv(h)
    else:
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
        if attn.qkv_bias_separate:
            qkv = attn.qkv(h) + bias
        else:
            qkv = F.linear(h, linear_weight(attn.qkv), bias)
    q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _check_quantized(attn: Any) -> None:
    fused = getattr(attn, "q_bias", None) is not None and not attn.qkv_bias_separate
    if fused and is_quantized(attn.qkv):
        raise UnsupportedModelError(
            f"timm's {type(attn).__name__} multiplies by the weight of its qkv layer, which a"
            " quantised layer keeps packed; leave the qkv layers as they are, by naming the layers"
            " to quantise, or set qkv_bias_separate of every attention"
        )


class EvaAdapter(TimmAdapter):
    """``Eva``: the same rotary table in every block, or one per block."""

    def asks_positions(self, vit: Any) -> bool:
        """See :class:`TimmAdapter`."""
        return vit.rope is not None

    def pools_prefix(self, vit: Any) -> bool:
        """See :class:`TimmAdapter`."""
        return vit.attn_pool is not None

    def embedded(self, vit: Any, images: Tensor) -> tuple[Tensor, Positions | None]:
        """See :class:`TimmAdapter`."""
        x, rope = vit._pos_embed(vit.patch_embed(images))
        x = vit.norm_pre(x)
        if rope is None:
            return x, None
        mixed = getattr(vit, "rope_mixed", False)
        return x, Positions(rope=tuple(rope) if mixed else (rope,) * len(vit.blocks))


ATTENTIONS |= {EvaAttention: RotaryAttention(), AttentionRope: RotaryAttention()}
BLOCKS |= {EvaBlock: PreNormGamma(), EvaBlockPostNorm: ResPost()}
register_adapter(Eva, EvaAdapter)
