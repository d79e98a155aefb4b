"""``timm.models.naflexvit``: whole images of any size; packed patch sequences are not reduced."""

from __future__ import annotations

from typing import Any

from timm.models.naflexvit import NaFlexVit
from torch import Tensor

from tdm_lightning.core.positions import Positions
from tdm_lightning.vit.adapters.registry import register_adapter
from tdm_lightning.vit.adapters.timm_base import TimmAdapter


class NaFlexAdapter(TimmAdapter):
    """``NaFlexVit``, with or without RoPE; its blocks are those of the other modules."""

    def asks_positions(self, vit: Any) -> bool:
        """See :class:`TimmAdapter`."""
        return vit.rope is not None

    def embedded(self, vit: Any, images: Tensor) -> tuple[Tensor, Positions | None]:
        """See :class:`TimmAdapter`."""
        x, grid = vit.embeds(images)
        x = vit.norm_pre(x)
        if vit.rope is None:
            return x, None
        rope = vit.rope.get_embed(shape=grid)
        return x, Positions(rope=tuple(rope) if vit.rope_is_mixed else (rope,) * len(vit.blocks))

    def embedding(self, vit: Any) -> Any:
        """See :class:`TimmAdapter`."""
        return vit.embeds

    def input_size(self, vit: Any) -> tuple[int, int, int]:
        """See :class:`Adapter`."""
        height, width = vit.pretrained_cfg["input_size"][1:]
        return self.channels(vit), height, width

    def channels(self, vit: Any) -> int:
        """See :class:`TimmAdapter`."""
        return vit.embeds.in_chans

    def class_tokens(self, vit: Any) -> int:
        """See :class:`TimmAdapter`."""
        return 0 if vit.embeds.cls_token is None else 1


register_adapter(NaFlexVit, NaFlexAdapter)
