"""What the adapters of timm's ViT classes have in common: embedding, checks, pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.positions import Positions
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import SettingError, UnsupportedModelError
from tdm_lightning.vit.adapters.base import Size
from tdm_lightning.vit.adapters.parts import PartsAdapter
from tdm_lightning.vit.pooling import log_size, mean_over_patches

#: How timm's heads pool: over patches, each counted as many times as it stands for …
_OVER_PATCHES = ("avg", "avgmax", "max", "map", "prr")
#: … or not at all.
_UNPOOLED = ""


class TimmAdapter(PartsAdapter):
    """timm's ViT classes: a list of blocks, ``patch_embed``, ``norm`` and ``forward_head``."""

    def embedded(self, vit: Any, images: Tensor) -> tuple[Tensor, Positions | None]:
        """Tokens B×T×C in front of the first block, and what later blocks want to know of
        positions.
        """
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))), None

    def asks_positions(self, vit: Any) -> bool:
        """Whether the blocks ask where a token is, beyond what was added in front of the first."""
        return False

    def pools_prefix(self, vit: Any) -> bool:
        """Whether the head pools over the prefix tokens too."""
        return bool(getattr(vit, "pool_include_prefix", False))

    def embedding(self, vit: Any) -> Any:
        """The module that makes patches of images."""
        return vit.patch_embed

    def channels(self, vit: Any) -> int:
        """Number of image channels."""
        # In hybrid models the patches are made of a convolutional network's features: its first
        # layer sees the image.
        layers = self.embedding(vit).modules()
        first = next(layer for layer in layers if isinstance(layer, nn.Conv2d))
        return first.in_channels

    def class_tokens(self, vit: Any) -> int:
        """The class token, and the distillation token of distilled models, because both feed the
        classifier; register tokens do not. 0 for a model without a class token.
        """
        if getattr(vit, "cls_token", None) is None:
            return 0
        return 2 if getattr(vit, "dist_token", None) is not None else 1

    def info(self, vit: Any) -> ModelInfo:
        """See :meth:`Adapter.info`."""
        known = ("token", _UNPOOLED, *_OVER_PATCHES)
        if vit.global_pool not in known:
            raise UnsupportedModelError(
                f"{type(vit).__name__} pools by {vit.global_pool!r}, and how merged tokens would"
                f" count there is not known; known are {', '.join(map(repr, known))}"
            )
        rows, columns = self.grid(vit, self.input_size(vit)[1:])
        drop = getattr(vit, "patch_drop", None)
        return ModelInfo(
            depth=len(vit.blocks),
            patches=rows * columns,
            width=vit.embed_dim,
            heads=_first_heads(vit.blocks[0]),
            prefix=vit.num_prefix_tokens,
            class_tokens=self.class_tokens(vit),
            pooling="token" if vit.global_pool == "token" else "patches",
            relative_positions=self.asks_positions(vit),
            random_patches=not isinstance(drop, (nn.Identity, type(None))),
            num_classes=vit.num_classes,
            device=next(vit.parameters()).device,
        )

    def input_size(self, vit: Any) -> tuple[int, int, int]:
        """See :meth:`Adapter.input_size`."""
        embed = self.embedding(vit)
        height, width = getattr(embed, "img_size", None) or vit.pretrained_cfg["input_size"][1:]
        return self.channels(vit), height, width

    def grid(self, vit: Any, size: Size) -> Size:
        """See :meth:`Adapter.grid`."""
        rows, columns = self.embedding(vit).dynamic_feat_size(size)
        return int(rows), int(columns)

    def blocks(self, vit: Any) -> Sequence[nn.Module]:
        """See :meth:`Adapter.blocks`."""
        return vit.blocks

    def needs_sizes(self, vit: Any) -> bool:
        """See :meth:`Adapter.needs_sizes`."""
        return vit.global_pool in _OVER_PATCHES

    def embed(self, vit: Any, images: Tensor, info: ModelInfo) -> Tokens:
        """See :meth:`Adapter.embed`."""
        self.check_images(vit, images)
        x, positions = self.embedded(vit, images)
        patches = x.shape[1] - info.prefix
        if patches != info.patches:
            info = replace(info, patches=patches)
        size = None
        if self.needs_sizes(vit) or (positions is not None and positions.columns is not None):
            size = torch.ones(x.shape[0], patches, device=x.device)
        return Tokens(x, info.prefix, info, size, positions)

    def check_images(self, vit: Any, images: Tensor) -> None:
        """Raise ``ValueError`` for images that the model cannot take."""
        channels, embed = self.channels(vit), self.embedding(vit)
        if images.ndim != 4 or images.shape[1] != channels:
            raise SettingError(
                f"images must have shape B×{channels}×H×W for this model, got {tuple(images.shape)}"
            )
        height, width = images.shape[-2:]
        expected = getattr(embed, "img_size", None)
        if getattr(embed, "strict_img_size", False) and expected is not None:
            if (height, width) != tuple(expected):
                raise SettingError(
                    f"images must be {expected[0]}×{expected[1]} for this model, got"
                    f" {height}×{width}; resize them, or create the timm model with"
                    " img_size=… or dynamic_img_size=True"
                )
            return  # a model's own size may leave a margin that is no full patch
        patch = embed.patch_size
        if height < patch[0] or width < patch[1]:
            raise SettingError(
                f"an image of {height}×{width} is smaller than one patch, {patch[0]}×{patch[1]}"
            )
        padded = getattr(embed, "dynamic_img_pad", False)
        if not padded and (height % patch[0] or width % patch[1]):
            raise SettingError(
                f"images must be a multiple of the patch size {patch[0]}×{patch[1]} for this"
                f" model, got {height}×{width}; resize them, or create the timm model with"
                " dynamic_img_pad=True"
            )

    def norm(self, vit: Any, x: Tensor) -> Tensor:
        """See :meth:`Adapter.norm`."""
        return vit.norm(x)

    def head(
        self, vit: Any, features: Tensor, size: Tensor | None = None, pre_logits: bool = False
    ) -> Tensor:
        """See :meth:`Adapter.head`.

        Average pooling becomes the mean over *patches*, that is over tokens weighted by ``size``;
        attention pooling adds ``log(size)`` to the logits, which equals letting each token appear
        ``size`` times. Class-token pooling needs no sizes.
        """
        if size is None or not self.needs_sizes(vit):
            return vit.forward_head(features, pre_logits=pre_logits)
        with_prefix, prefix = self.pools_prefix(vit), vit.num_prefix_tokens
        weight = nn.functional.pad(size, (prefix, 0), value=1.0) if with_prefix else size
        x = features if with_prefix else features[:, prefix:]
        if vit.global_pool in ("map", "prr"):
            pooled = vit.attn_pool(x, attn_mask=log_size(weight, x.dtype))
            pooled = vit.head_drop(vit.fc_norm(pooled))
            return pooled if pre_logits else vit.head(pooled)
        pooled = mean_over_patches(x, weight)
        if vit.global_pool in ("avgmax", "max"):
            largest = x.masked_fill((weight == 0).unsqueeze(-1), -torch.inf)
            largest = largest.amax(dim=1, keepdim=True)
            pooled = largest if vit.global_pool == "max" else 0.5 * (pooled + largest)
        # Present the pooled feature as the only patch: whatever else the model's head does stays
        # its own.
        if not with_prefix:
            pooled = torch.cat((features[:, :prefix], pooled), dim=1)
        return vit.forward_head(pooled, pre_logits=pre_logits)


def _first_heads(block: nn.Module) -> int:
    counts = (getattr(inner, "num_heads", None) for inner in block.modules())
    return next((count for count in counts if count is not None), 0)
