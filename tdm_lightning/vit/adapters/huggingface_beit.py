"""``transformers``: BEiT and Data2VecVision, whose layers add a bias for each pair of patches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.positions import Positions
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.strategies.base import Requirements
from tdm_lightning.vit.adapters.base import Read
from tdm_lightning.vit.adapters.huggingface import LAYERS, HuggingFaceAdapter
from tdm_lightning.vit.adapters.huggingface_layers import BeforeAndAfter, SeparateProjections
from tdm_lightning.vit.adapters.relative import BiasedAttention
from tdm_lightning.vit.pooling import mean_over_patches


class BiasedProjections(SeparateProjections, BiasedAttention):
    """Queries, keys and values of a layer each, and the bias that the layer has looked up."""

    plain = False

    def table(self, attn: Any, shared: Tensor | None) -> Tensor | None:
        """See :class:`BiasedAttention`."""
        return shared


class BeitLayer(BeforeAndAfter):
    """``BeitLayer``: its own bias on top of the shared one, layer scales, drop path."""

    plain = False

    def own_bias(self, block: Any) -> Any:
        """The module that makes the layer's own bias; ``None``: it has none."""
        return block.relative_position_bias

    def attend(
        self, block: Any, index: int, tokens: Tokens, needs: frozenset[str], rows: int | None
    ) -> tuple[Tensor, Read]:
        """See :class:`BlockParts`."""
        own, positions = self.own_bias(block), tokens.positions
        if own is not None and positions is not None and positions.columns is not None:
            bias = own((tokens.info.patches // positions.columns, positions.columns))
            bias = bias if positions.bias is None else bias + positions.bias
            tokens = tokens.replace(positions=replace(positions, bias=bias))
        return super().attend(block, index, tokens, needs, rows)

    def residual(self, block: Any, mixed: Tensor) -> Tensor:
        """See :class:`PreNorm`."""
        return block.drop_path(_scaled(block.dropout(mixed), block.lambda_1))

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :class:`BlockParts`."""
        grown = block.dropout(block.mlp(block.layernorm_after(x)))
        return x + block.drop_path(_scaled(grown, block.lambda_2))


def _scaled(x: Tensor, scale: Tensor | float | None) -> Tensor:
    return x if scale is None else scale * x


class BeitAdapter(HuggingFaceAdapter):
    """``BeitModel`` and its backbone."""

    def info(self, vit: Any) -> ModelInfo:
        """See :meth:`Adapter.info`."""
        info = replace(super().info(vit), relative_positions=True)
        return replace(info, pooling="patches") if vit.config.use_mean_pooling else info

    def shared_bias(self, vit: Any) -> Any:
        """The module of the bias that all layers share; ``None``: there is none."""
        return vit.shared_position_bias

    def given(self, vit: Any, images: Tensor) -> dict[str, Any]:
        """See :class:`HuggingFaceAdapter`."""
        shared, size = self.shared_bias(vit), images.shape[-2:]
        mask = None if shared is None else shared(self.grid(vit, (size[0], size[1])))
        return {"resolution": size, "attention_mask": mask}

    def entering(
        self, vit: Any, x: Tensor, info: ModelInfo, given: Mapping[str, Any] | None = None
    ) -> Tokens:
        """See :meth:`Adapter.entering`; what all layers share comes as their attention mask."""
        given = given or {}
        tokens = super().entering(vit, x, info, given)
        columns = self.grid(vit, given["resolution"])[1]
        size = torch.ones(x.shape[0], tokens.count, device=x.device)
        shared = None if self.shared_bias(vit) is None else self.received_bias(given)
        return tokens.replace(size=size, positions=Positions(bias=shared, columns=columns))

    def received_bias(self, given: Mapping[str, Any]) -> Tensor:
        """The shared bias among what layers are given, 1×H×T×T."""
        return given["attention_mask"]

    def head(
        self, vit: Any, features: Tensor, size: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        """See :class:`HuggingFaceAdapter`."""
        if not vit.config.use_mean_pooling:
            return features[:, 0]
        patches = features[:, 1:]
        mean = patches.mean(1) if size is None else mean_over_patches(patches, size).squeeze(1)
        norm = getattr(getattr(vit, "pooler", None), "layernorm", None)
        return mean if norm is None else norm(mean)


class NestedProjections(BiasedProjections):
    """``Data2VecVisionAttention``: projections in one module, what comes behind in another."""

    def heads(self, attn: Any, h: Tensor, tokens: Tokens, index: int) -> Any:
        """See :class:`AttentionParts`."""
        return super().heads(_Named(attn), h, tokens, index)

    def asked(self, attn: Any, h: Tensor, rows: int, tokens: Tokens, index: int) -> Any:
        """See :class:`AttentionParts`."""
        return super().asked(_Named(attn), h, rows, tokens, index)

    def dropout(self, attn: Any) -> float:
        """See :class:`AttentionParts`."""
        return attn.attention.dropout.p if attn.training else 0.0

    def projected(self, attn: Any, x: Tensor, h: Tensor) -> Tensor:
        """See :class:`AttentionParts`."""
        return attn.output(x, h)


class _Named:
    """An attention of the older layout under the names of the newer one."""

    def __init__(self, attn: Any) -> None:
        inner = attn.attention
        self.q_proj, self.k_proj, self.v_proj = inner.query, inner.key, inner.value
        self.head_dim = inner.attention_head_size
        self.scaling = self.head_dim**-0.5


class Data2VecVisionLayer(BeitLayer):
    """``Data2VecVisionLayer``, of the older layout."""

    def own_bias(self, block: Any) -> Any:
        """See :class:`BeitLayer`."""
        return getattr(block.attention.attention, "relative_position_bias", None)

    def residual(self, block: Any, mixed: Tensor) -> Tensor:
        """See :class:`PreNorm`."""
        return block.drop_path(_scaled(mixed, block.lambda_1))

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :class:`BlockParts`."""
        grown = block.output(block.intermediate(block.layernorm_after(x)))
        return x + block.drop_path(_scaled(grown, block.lambda_2))


class Data2VecVisionAdapter(BeitAdapter):
    """``Data2VecVisionModel``: its encoder collects hidden states itself."""

    collects = True

    def check(self, vit: Any, requirements: Requirements) -> None:
        """See :meth:`Adapter.check`."""
        super().check(vit, requirements)
        known = ("Data2VecVisionSelfAttention", "Data2VecVisionSdpaSelfAttention")
        for block in self.blocks(vit):
            inner = type(block.attention.attention).__name__
            if inner not in known:
                raise UnsupportedModelError(
                    f"its attention is {inner}; supported are {', '.join(known)}"
                )

    def projections(self, attn: Any) -> Any:
        """See :class:`HuggingFaceAdapter`."""
        return getattr(attn.attention, "query", None)

    def shared_bias(self, vit: Any) -> Any:
        """See :class:`BeitAdapter`."""
        return getattr(vit.encoder, "relative_position_bias", None)

    def given(self, vit: Any, images: Tensor) -> dict[str, Any]:
        """See :class:`HuggingFaceAdapter`."""
        given = super().given(vit, images)
        return {
            "resolution": given["resolution"],
            "relative_position_bias": given["attention_mask"],
        }

    def received_bias(self, given: Mapping[str, Any]) -> Tensor:
        """See :class:`BeitAdapter`."""
        return given["relative_position_bias"]

    def returned(self, x: Tensor) -> Any:
        """See :meth:`Adapter.returned`."""
        return (x,)


LAYERS["beit.modeling_beit"] = ("BeitLayer", BeitLayer(), "BeitAttention", BiasedProjections())
LAYERS["data2vec.modeling_data2vec_vision"] = (
    "Data2VecVisionLayer",
    Data2VecVisionLayer(),
    "Data2VecVisionAttention",
    NestedProjections(),
)
BEIT, DATA2VEC = BeitAdapter(), Data2VecVisionAdapter()
