"""What differs between timm's ViT classes in front of their blocks: embedding, positions, image
sizes.

A family calls the model's own modules. Everything behind it, the blocks' adapters and the head, is
told apart elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from tdm_lightning.core.tokens import Geometry
from tdm_lightning.errors import SettingError, SettingTypeError

Size = tuple[int, int]


class Family:
    """timm's ``VisionTransformer``: absolute positions only, added in front of the first block."""

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Geometry | None]:
        """Tokens B×T×C in front of the first block, and what later blocks want to know of
        positions.

        Args:
            vit: the timm model.
            images: B×C×H×W.
        """
        return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))), None

    def places(self, vit: Any) -> bool:
        """Whether the blocks ask where a token is, beyond what was added to it in front of the
        first.
        """
        return False

    def pools_prefix(self, vit: Any) -> bool:
        """Whether the head pools over the prefix tokens too."""
        return bool(getattr(vit, "pool_include_prefix", False))

    def embedding(self, vit: Any) -> Any:
        """The module that makes patches of images."""
        return vit.patch_embed

    def grid(self, vit: Any, size: Size) -> Size:
        """Rows and columns of patches in an image of ``size`` pixels."""
        rows, columns = self.embedding(vit).dynamic_feat_size(size)
        return int(rows), int(columns)

    def columns(self, vit: Any, images: Tensor) -> int:
        """Columns of patches in images, B×C×H×W."""
        return self.grid(vit, (images.shape[-2], images.shape[-1]))[1]

    def input_size(self, vit: Any) -> tuple[int, int, int]:
        """Channels, height and width that the model was made for."""
        embed = self.embedding(vit)
        height, width = getattr(embed, "img_size", None) or vit.pretrained_cfg["input_size"][1:]
        return self.channels(vit), height, width

    def channels(self, vit: Any) -> int:
        """Number of image channels."""
        # In hybrid models the patches are made of a convolutional network's features: its first
        # layer sees the image.
        first = next(
            layer for layer in self.embedding(vit).modules() if isinstance(layer, nn.Conv2d)
        )
        return first.in_channels

    def class_rows(self, vit: Any) -> int:
        """Number of leading tokens whose attention measures importance.

        The class token, and the distillation token of distilled models, because both feed the
        classifier; register tokens do not. 0 for a model without a class token.
        """
        if getattr(vit, "cls_token", None) is None:
            return 0
        return 2 if getattr(vit, "dist_token", None) is not None else 1

    def check(self, vit: Any, images: Tensor) -> None:
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
                    f" {height}×{width}; resize them, or create the timm model with img_size=… or"
                    " dynamic_img_size=True"
                )
            return  # a model's own size may leave a margin that is no whole patch
        patch = embed.patch_size
        if height < patch[0] or width < patch[1]:
            raise SettingError(
                f"an image of {height}×{width} is smaller than one patch, {patch[0]}×{patch[1]}"
            )
        if not getattr(embed, "dynamic_img_pad", False) and (height % patch[0] or width % patch[1]):
            raise SettingError(
                f"images must be a multiple of the patch size {patch[0]}×{patch[1]} for this model,"
                f" got {height}×{width}; resize them, or create the timm model with"
                " dynamic_img_pad=True"
            )


class EvaFamily(Family):
    """``Eva`` (EVA-02, DINOv3, Perception Encoder): rotary positions (RoPE), the same in every
    block or one table per block.
    """

    def places(self, vit: Any) -> bool:
        """See :meth:`Family.places`."""
        return vit.rope is not None

    def pools_prefix(self, vit: Any) -> bool:
        """See :meth:`Family.pools_prefix`."""
        return vit.attn_pool is not None

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Geometry | None]:
        """See :meth:`Family.embed`."""
        x, rope = vit._pos_embed(vit.patch_embed(images))
        x = vit.norm_pre(x)
        if rope is None:
            return x, None
        tables = tuple(rope) if getattr(vit, "rope_mixed", False) else (rope,) * len(vit.blocks)
        return x, Geometry(rope=tables)


class BeitFamily(Family):
    """``Beit``: a relative position bias in every block, or one that all share."""

    def places(self, vit: Any) -> bool:
        """See :meth:`Family.places`."""
        return True

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Geometry | None]:
        """See :meth:`Family.embed`."""
        x = vit.patch_embed(images)
        x = torch.cat((vit.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if vit.pos_embed is not None:
            x = x + vit.pos_embed
        bias = None if vit.rel_pos_bias is None else vit.rel_pos_bias().unsqueeze(0)
        return vit.pos_drop(x), Geometry(bias=bias, columns=self.columns(vit, images))


class RelPosFamily(Family):
    """``VisionTransformerRelPos``: a relative position bias, from a table or a small network, and
    no absolute position.
    """

    def places(self, vit: Any) -> bool:
        """See :meth:`Family.places`."""
        return True

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Geometry | None]:
        """See :meth:`Family.embed`."""
        x = vit.patch_embed(images)
        if vit.cls_token is not None:
            x = torch.cat((vit.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        bias = None if vit.shared_rel_pos is None else vit.shared_rel_pos.get_bias()
        return x, Geometry(bias=bias, columns=self.columns(vit, images))


class NaFlexFamily(Family):
    """``NaFlexVit`` on whole images of any size; with or without RoPE. Its packed patch sequences
    are not reduced.
    """

    def places(self, vit: Any) -> bool:
        """See :meth:`Family.places`."""
        return vit.rope is not None

    def embed(self, vit: Any, images: Tensor) -> tuple[Tensor, Geometry | None]:
        """See :meth:`Family.embed`."""
        x, grid = vit.embeds(images)
        x = vit.norm_pre(x)
        if vit.rope is None:
            return x, None
        rope = vit.rope.get_embed(shape=grid)
        return x, Geometry(rope=tuple(rope) if vit.rope_is_mixed else (rope,) * len(vit.blocks))

    def embedding(self, vit: Any) -> Any:
        """See :meth:`Family.embedding`."""
        return vit.embeds

    def input_size(self, vit: Any) -> tuple[int, int, int]:
        """See :meth:`Family.input_size`."""
        height, width = vit.pretrained_cfg["input_size"][1:]
        return self.channels(vit), height, width

    def channels(self, vit: Any) -> int:
        """See :meth:`Family.channels`."""
        return vit.embeds.in_chans

    def class_rows(self, vit: Any) -> int:
        """See :meth:`Family.class_rows`."""
        return 0 if vit.embeds.cls_token is None else 1


_FAMILIES: dict[type[nn.Module], Family] = {
    VisionTransformer: Family(),
    Eva: EvaFamily(),
    Beit: BeitFamily(),
    VisionTransformerRelPos: RelPosFamily(),
    NaFlexVit: NaFlexFamily(),
}

#: The timm classes that can be reduced; their subclasses can too.
VIT_CLASSES = tuple(_FAMILIES)


def family_of(vit: nn.Module) -> Family:
    """The family of a timm model.

    Raises:
        TypeError: if it belongs to none.
    """
    for kind in type(vit).__mro__:
        if kind in _FAMILIES:
            return _FAMILIES[kind]
    known = ", ".join(kind.__name__ for kind in VIT_CLASSES)
    raise SettingTypeError(f"{type(vit).__name__} is none of timm's ViT classes {known}")


def class_rows(vit: nn.Module) -> int:
    """Number of leading tokens whose attention measures importance, see
    :meth:`Family.class_rows`.
    """
    return family_of(vit).class_rows(vit)


def grid_size(vit: nn.Module, size: Size) -> Size:
    """Rows and columns of patches that a timm model makes of an image of ``size`` pixels."""
    return family_of(vit).grid(vit, size)


def input_size(vit: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width that a timm model was made for."""
    return family_of(vit).input_size(vit)


def patch_count(vit: nn.Module) -> int:
    """Number of patches at the image size that a timm model was made for."""
    rows, columns = grid_size(vit, input_size(vit)[1:])
    return rows * columns
