"""``transformers``: ViT, DeiT, ViT-MSN, ViT-MAE, I-JEPA, DINOv2 and v3, CLIP, SigLIP; of version
5.20 on, whose layers and attentions these are. Nothing of it is imported: classes are known by
their names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.positions import Positions
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.strategies.base import Requirements
from tdm_lightning.vit.adapters.attention import Heads
from tdm_lightning.vit.adapters.base import Size
from tdm_lightning.vit.adapters.eva import rotation
from tdm_lightning.vit.adapters.parts import (
    ATTENTIONS,
    BLOCKS,
    AttentionParts,
    PartsAdapter,
    PreNorm,
)
from tdm_lightning.vit.pooling import mean_over_patches

_OLD = "it is made as older versions of transformers make it; version 5.20 or newer is needed"
#: Ways to compute attention that a bias of every key can be given to.
IMPLEMENTATIONS = ("eager", "sdpa", None)


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


#: Layers and attentions by the module of transformers and their names.
_LAYERS = {
    "vit.modeling_vit": ("ViTLayer", "ViTAttention", BeforeAndAfter()),
    "deit.modeling_deit": ("DeiTLayer", "DeiTAttention", BeforeAndAfter()),
    "vit_msn.modeling_vit_msn": ("ViTMSNLayer", "ViTMSNAttention", BeforeAndAfter()),
    "ijepa.modeling_ijepa": ("IJepaLayer", "IJepaAttention", BeforeAndAfter()),
    "dinov2.modeling_dinov2": ("Dinov2Layer", "Dinov2Attention", Scaled()),
    "dinov2_with_registers.modeling_dinov2_with_registers": (
        "Dinov2WithRegistersLayer",
        "Dinov2WithRegistersAttention",
        Scaled(),
    ),
    "dinov3_vit.modeling_dinov3_vit": ("DINOv3ViTLayer", "DINOv3ViTAttention", Scaled()),
    "vit_mae.modeling_vit_mae": ("ViTMAELayer", "ViTMAEAttention", BeforeAndAfter()),
    "clip.modeling_clip": ("CLIPEncoderLayer", "CLIPAttention", Bare()),
    "siglip.modeling_siglip": ("SiglipEncoderLayer", "SiglipAttention", Bare()),
}


class HuggingFaceAdapter(PartsAdapter):
    """Image encoders of transformers. They run themselves, and their layers are reduced in their
    place; taken apart here is what tools ask for.
    """

    in_place = True
    takes_rows = False  # its features are wanted

    def info(self, vit: Any) -> ModelInfo:
        """See :meth:`Adapter.info`."""
        rows, columns = self.grid(vit, self.input_size(vit)[1:])
        prefix, class_tokens = _prefix(vit)
        return ModelInfo(
            depth=len(self.blocks(vit)),
            patches=rows * columns,
            width=vit.config.hidden_size,
            heads=vit.config.num_attention_heads,
            prefix=prefix,
            class_tokens=class_tokens,
            pooling="token" if class_tokens else "patches",
            relative_positions=hasattr(vit, "rope_embeddings"),
            random_patches=bool(getattr(vit.config, "mask_ratio", 0)),
            device=next(vit.parameters()).device,
        )

    def input_size(self, vit: Any) -> tuple[int, int, int]:
        """See :meth:`Adapter.input_size`."""
        return vit.config.num_channels, *_pair(vit.config.image_size)

    def grid(self, vit: Any, size: Size) -> Size:
        """See :meth:`Adapter.grid`."""
        rows, columns = _pair(vit.config.patch_size)
        return size[0] // rows, size[1] // columns

    def blocks(self, vit: Any) -> Any:
        """See :meth:`Adapter.blocks`."""
        inner = getattr(vit, "encoder", getattr(vit, "model", vit))
        layers = getattr(inner, "layer", getattr(inner, "layers", None))
        if layers is None:
            raise UnsupportedModelError(_OLD)
        return layers

    def norms(self, vit: Any) -> Sequence[nn.Module]:
        """See :meth:`Adapter.norms`."""
        names = ("layernorm", "post_layernorm", "norm")
        return [getattr(vit, name) for name in names if hasattr(vit, name)]

    def check(self, vit: Any, requirements: Requirements) -> None:
        """See :meth:`Adapter.check`."""
        chosen = vit.config._attn_implementation
        if chosen not in IMPLEMENTATIONS:
            raise UnsupportedModelError(
                f"its attention is computed by {chosen!r}, which takes no bias of a key; choose"
                " 'sdpa' or 'eager' with set_attn_implementation()"
            )
        for block in self.blocks(vit):
            _know(type(block))
        super().check(vit, requirements)
        for block in self.blocks(vit):
            for attn in BLOCKS[type(block)].attentions(block):
                if not hasattr(attn, "q_proj"):
                    raise UnsupportedModelError(_OLD)

    def embed(self, vit: Any, images: Tensor, info: ModelInfo) -> Tokens:
        """See :meth:`Adapter.embed`."""
        x = vit.embeddings(images)
        if isinstance(x, tuple):  # with what was masked
            x = x[0]
        if hasattr(vit, "pre_layrnorm"):  # as transformers spells it
            x = vit.pre_layrnorm(x)
        given = {}
        if hasattr(vit, "rope_embeddings"):
            given["position_embeddings"] = vit.rope_embeddings(images)
        return self.entering(x, info, given)

    def entering(
        self, x: Tensor, info: ModelInfo, given: Mapping[str, Any] | None = None
    ) -> Tokens:
        """See :meth:`Adapter.entering`; of what layers are given, the rotary tables are kept."""
        tokens = super().entering(x, info)
        positions = (given or {}).get("position_embeddings")
        if positions is None:
            return tokens
        cos, sin = positions
        table = torch.cat((sin, cos), dim=-1)
        return tokens.replace(positions=Positions(rope=(table,) * info.depth))

    def norm(self, vit: Any, x: Tensor) -> Tensor:
        """See :meth:`Adapter.norm`."""
        (norm,) = self.norms(vit)
        return norm(x)

    def head(
        self, vit: Any, features: Tensor, size: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        """The class token, or the mean of the patches: these encoders have no classifier."""
        if _prefix(vit)[1]:
            return features[:, 0]
        return features.mean(1) if size is None else mean_over_patches(features, size).squeeze(1)


def _know(layer: type[nn.Module]) -> None:
    """Register a layer's class, and that of its attention, where they are known by their names."""
    for kind in layer.__mro__:
        library, _, module = kind.__module__.partition(".models.")
        known = _LAYERS.get(module)
        if library == "transformers" and known is not None and kind.__name__ == known[0]:
            BLOCKS[kind] = known[2]
            attention = getattr(sys.modules[kind.__module__], known[1])
            rotates = known[1].startswith("DINOv3")
            ATTENTIONS[attention] = RotatedProjections() if rotates else SeparateProjections()


def _prefix(vit: Any) -> tuple[int, int]:
    """Number of tokens in front of the patches, and how many of them are class tokens."""
    name = type(vit).__name__
    if name.startswith(("Siglip", "IJepa")):
        return 0, 0
    classes = 2 if name.startswith("DeiT") else 1
    return classes + getattr(vit.config, "num_register_tokens", 0), classes


def _pair(size: Any) -> Size:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


ADAPTER = HuggingFaceAdapter()
