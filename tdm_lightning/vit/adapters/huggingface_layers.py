"""Layers of transformers' image encoders, taken apart; of version 5.20 on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.tokens import Tokens
from tdm_lightning.vit.adapters.attention import Heads
from tdm_lightning.vit.adapters.eva import rotation
from tdm_lightning.vit.adapters.parts import AttentionParts, PreNorm


class SeparateProjections(AttentionParts):
    """Queries, keys and values of a layer each."""

    plain = True
    native = False  # its functions take other masks

    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`."""
        q, k, v = (_split(attn, layer(h)) for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        return Heads(q, k, v, self.scale(attn), k)

    def asked(self, attn: Any, h: Tensor, rows: int, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`: no other queries are formed."""
        q = _split(attn, attn.q_proj(h[:, :rows]))
        k, v = (_split(attn, layer(h)) for layer in (attn.k_proj, attn.v_proj))
        return Heads(q, k, v, self.scale(attn), k)

    def queries_and_keys(self, attn: Any, h: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`AttentionParts`."""
        return _split(attn, attn.q_proj(h)), _split(attn, attn.k_proj(h))

    def weighted(self, attn: Any, weights: Tensor, h: Tensor) -> Tensor:
        """See :class:`AttentionParts`."""
        weights = nn.functional.dropout(weights, self.dropout(attn))
        mixed = weights @ _split(attn, attn.v_proj(h))
        return self.projected(attn, mixed.transpose(1, 2).flatten(2), h)

    def scale(self, attn: Any) -> float:
        """See :class:`AttentionParts`."""
        return attn.scaling if hasattr(attn, "scaling") else attn.scale

    def dropout(self, attn: Any) -> float:
        """See :class:`AttentionParts`."""
        if not attn.training:
            return 0.0
        return attn.attention_dropout if hasattr(attn, "attention_dropout") else attn.dropout

    def projected(self, attn: Any, x: Tensor, h: Tensor) -> Tensor:
        """See :class:`AttentionParts`."""
        return attn.o_proj(x) if hasattr(attn, "o_proj") else attn.out_proj(x)


class RotatedProjections(SeparateProjections):
    """The same, queries and keys of patches rotated by their positions."""

    plain = False

    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`."""
        found = super().heads(attn, h, tokens, index)
        table = rotation(tokens, index)
        if table is None:
            return found
        q, k = (_rotated(x, table) for x in (found.q, found.k))
        return replace(found, q=q, k=k)

    def asked(self, attn: Any, h: Tensor, rows: int, tokens: Tokens, index: int) -> Heads:
        """See :class:`AttentionParts`."""
        heads = self.heads(attn, h, tokens, index)
        return replace(heads, q=heads.q[:, :, :rows])


def _rotated(x: Tensor, table: Tensor) -> Tensor:
    """Queries or keys B×H×T×d, those of the patches rotated by sines and cosines, N×2d."""
    first = x.shape[2] - table.shape[-2]
    sin, cos = table.chunk(2, dim=-1)
    patches = x[:, :, first:]
    low, high = patches.chunk(2, dim=-1)
    turned = patches * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((x[:, :, :first], turned), dim=2)


def _split(attn: Any, x: Tensor) -> Tensor:
    """B×T×C as B×H×T×d."""
    return x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)


class BeforeAndAfter(PreNorm):
    """``ViTLayer`` and its kin: one dropout behind both halves."""

    def attentions(self, block: Any) -> Sequence[nn.Module]:
        """See :class:`BlockParts`."""
        return [block.attention]

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """See :class:`PreNorm`."""
        return block.layernorm_before, block.layernorm_after

    def residual(self, block: Any, mixed: Tensor) -> Tensor:
        """See :class:`PreNorm`."""
        return block.dropout(mixed)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :class:`BlockParts`."""
        return x + block.dropout(block.mlp(block.layernorm_after(x)))


class Scaled(PreNorm):
    """``Dinov2Layer``: layer scales, and one drop path behind both halves."""

    def attentions(self, block: Any) -> Sequence[nn.Module]:
        """See :class:`BlockParts`."""
        return [block.attention]

    def residual(self, block: Any, mixed: Tensor) -> Tensor:
        """See :class:`PreNorm`."""
        return block.drop_path(block.layer_scale1(mixed))

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :class:`BlockParts`."""
        return x + block.drop_path(block.layer_scale2(block.mlp(block.norm2(x))))


class Bare(PreNorm):
    """``CLIPEncoderLayer`` and ``SiglipEncoderLayer``: nothing but norms, attention and MLP."""

    def attentions(self, block: Any) -> Sequence[nn.Module]:
        """See :class:`BlockParts`."""
        return [block.self_attn]

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """See :class:`PreNorm`."""
        return block.layer_norm1, block.layer_norm2

    def residual(self, block: Any, mixed: Tensor) -> Tensor:
        """See :class:`PreNorm`."""
        return mixed

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :class:`BlockParts`."""
        return x + block.mlp(block.layer_norm2(x))
