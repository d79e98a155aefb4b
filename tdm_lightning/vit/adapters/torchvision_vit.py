"""``torchvision.models.vision_transformer``: ViT-B, -L and -H."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import Encoder, EncoderBlock, VisionTransformer

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.strategies.base import Requirements
from tdm_lightning.vit.adapters.base import Size, check_shape
from tdm_lightning.vit.adapters.multihead import check_multihead
from tdm_lightning.vit.adapters.parts import BLOCKS, PartsAdapter, PreNorm


class Encoding(PreNorm):
    """``EncoderBlock``."""

    def attentions(self, block: Any) -> Sequence[nn.Module]:
        """See :class:`BlockParts`."""
        return [block.self_attention]

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """See :class:`PreNorm`."""
        return block.ln_1, block.ln_2

    def residual(self, block: Any, mixed: Tensor) -> Tensor:
        """See :class:`PreNorm`."""
        return block.dropout(mixed)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :class:`BlockParts`."""
        return x + block.mlp(block.ln_2(x))


class TorchvisionAdapter(PartsAdapter):
    """torchvision's ViTs: one image size, a class token, and a head that reads it."""

    def info(self, vit: Any) -> ModelInfo:
        """See :meth:`Adapter.info`."""
        blocks = self.blocks(vit)
        *_, last = vit.heads.modules()
        return ModelInfo(
            depth=len(blocks),
            patches=vit.encoder.pos_embedding.shape[1] - 1,
            width=vit.hidden_dim,
            heads=blocks[0].num_heads,
            prefix=1,
            class_tokens=1,
            pooling="token",
            num_classes=last.out_features if isinstance(last, nn.Linear) else 0,
            device=vit.class_token.device,
        )

    def input_size(self, vit: Any) -> tuple[int, int, int]:
        """See :meth:`Adapter.input_size`."""
        first = next(layer for layer in vit.conv_proj.modules() if isinstance(layer, nn.Conv2d))
        return first.in_channels, vit.image_size, vit.image_size

    def grid(self, vit: Any, size: Size) -> Size:
        """See :meth:`Adapter.grid`."""
        return size[0] // vit.patch_size, size[1] // vit.patch_size

    def blocks(self, vit: Any) -> Any:
        """See :meth:`Adapter.blocks`."""
        return vit.encoder.layers

    def check(self, vit: Any, requirements: Requirements) -> None:
        """See :meth:`Adapter.check`."""
        own_patches = type(vit)._process_input is not VisionTransformer._process_input
        if own_patches or type(vit.encoder) is not Encoder:
            raise UnsupportedModelError(
                f"{type(vit).__name__} makes or encodes its patches in its own way; register an"
                " adapter for it with register_adapter()"
            )
        super().check(vit, requirements)
        for block in self.blocks(vit):
            check_multihead(block.self_attention)

    def norms(self, vit: Any) -> Sequence[nn.Module]:
        """See :meth:`Adapter.norms`."""
        return [vit.encoder.ln]

    def embed(self, vit: Any, images: Tensor, info: ModelInfo) -> Tokens:
        """See :meth:`Adapter.embed`."""
        check_shape(images, self.input_size(vit))
        x = vit._process_input(images)
        x = torch.cat((vit.class_token.expand(x.shape[0], -1, -1), x), dim=1)
        return Tokens(vit.encoder.dropout(x + vit.encoder.pos_embedding), 1, info)

    def norm(self, vit: Any, x: Tensor) -> Tensor:
        """See :meth:`Adapter.norm`."""
        return vit.encoder.ln(x)

    def head(
        self, vit: Any, features: Tensor, size: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        """See :meth:`Adapter.head`: the class token through all layers but the last, or all."""
        layers = vit.heads
        if pre_logits:
            layers = layers[:-1] if isinstance(layers, nn.Sequential) else nn.Identity()
        return layers(features[:, 0])


BLOCKS[EncoderBlock] = Encoding()
ADAPTER = TorchvisionAdapter()
