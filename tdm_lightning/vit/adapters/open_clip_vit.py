"""``open_clip.transformer``: open_clip's own image towers; those of timm are timm's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import UnsupportedModelError
from tdm_lightning.strategies.base import Requirements
from tdm_lightning.vit.adapters.base import Size, check_shape
from tdm_lightning.vit.adapters.multihead import check_multihead
from tdm_lightning.vit.adapters.parts import BLOCKS, PartsAdapter, PreNorm
from tdm_lightning.vit.pooling import mean_over_patches


class Residual(PreNorm):
    """``ResidualAttentionBlock``."""

    def norms(self, block: Any) -> tuple[nn.Module, nn.Module]:
        """See :class:`PreNorm`."""
        return block.ln_1, block.ln_2

    def residual(self, block: Any, mixed: Tensor) -> Tensor:
        """See :class:`PreNorm`."""
        return block.ls_1(mixed)

    def feed_forward(self, block: Any, x: Tensor) -> Tensor:
        """See :class:`BlockParts`."""
        return x + block.ls_2(block.mlp(block.ln_2(x)))


class OpenClipAdapter(PartsAdapter):
    """open_clip's image tower: a class token, and a head that reads it or the mean of the patches,
    through a projection.
    """

    def info(self, vit: Any) -> ModelInfo:
        """See :meth:`Adapter.info`."""
        blocks = self.blocks(vit)
        return ModelInfo(
            depth=len(blocks),
            patches=vit.positional_embedding.shape[0] - 1,
            width=vit.positional_embedding.shape[1],
            heads=blocks[0].attn.num_heads,
            prefix=1,
            class_tokens=1,
            pooling="token" if vit.pool_type == "tok" else "patches",
            random_patches=not isinstance(vit.patch_dropout, nn.Identity),
            num_classes=0 if vit.proj is None else vit.proj.shape[1],
            device=vit.class_embedding.device,
        )

    def input_size(self, vit: Any) -> tuple[int, int, int]:
        """See :meth:`Adapter.input_size`."""
        return vit.conv1.in_channels, *vit.image_size

    def grid(self, vit: Any, size: Size) -> Size:
        """See :meth:`Adapter.grid`."""
        return size[0] // vit.patch_size[0], size[1] // vit.patch_size[1]

    def blocks(self, vit: Any) -> Any:
        """See :meth:`Adapter.blocks`."""
        return vit.transformer.resblocks

    def norms(self, vit: Any) -> Sequence[nn.Module]:
        """See :meth:`Adapter.norms`."""
        return [vit.ln_post]

    def check(self, vit: Any, requirements: Requirements) -> None:
        """See :meth:`Adapter.check`."""
        if not hasattr(VisionTransformer, "_embeds"):
            raise UnsupportedModelError("open_clip of version 2.32 or newer is needed")
        if vit.attn_pool is not None or vit.pool_type == "none" or vit.output_tokens:
            raise UnsupportedModelError(
                "its head pools by attention, or gives tokens beside the pooled feature (CoCa), and"
                " how merged tokens would count there is not known; the class token or the mean of"
                " the patches is"
            )
        names = ("_embeds", "_pool", "_global_pool")
        own = [n for n in names if getattr(type(vit), n) is not getattr(VisionTransformer, n)]
        if own or type(vit.transformer) is not Transformer:
            raise UnsupportedModelError(
                f"{type(vit).__name__} embeds, encodes or pools in its own way; register an adapter"
                " for it with register_adapter()"
            )
        super().check(vit, requirements)
        for block in self.blocks(vit):
            if hasattr(block, "ln_1_kv"):
                raise UnsupportedModelError("its blocks attend to other tokens than their own")
            check_multihead(block.attn)

    def embed(self, vit: Any, images: Tensor, info: ModelInfo) -> Tokens:
        """See :meth:`Adapter.embed`."""
        check_shape(images, self.input_size(vit))
        return self.entering(vit, vit._embeds(images), info)  # some may be dropped at random

    def norm(self, vit: Any, x: Tensor) -> Tensor:
        """See :meth:`Adapter.norm`; some models have it behind the pooling."""
        return x if vit.final_ln_after_pool else vit.ln_post(x)

    def head(
        self, vit: Any, features: Tensor, size: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        """See :meth:`Adapter.head`: the image's feature, before or behind the projection."""
        if vit.pool_type == "tok":
            pooled = features[:, 0]
        elif size is None:
            pooled = features[:, 1:].mean(dim=1)
        else:
            pooled = mean_over_patches(features[:, 1:], size).squeeze(1)
        if vit.final_ln_after_pool:
            pooled = vit.ln_post(pooled)
        return pooled if pre_logits or vit.proj is None else pooled @ vit.proj


BLOCKS[ResidualAttentionBlock] = Residual()
ADAPTER = OpenClipAdapter()
