"""``transformers``: the NaFlex encoder of SigLIP 2, which is given patches and the shapes of their
grids. Its fixed sizes are of SigLIP's class.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.vit.adapters.base import Size, check_shape
from tdm_lightning.vit.adapters.huggingface import LAYERS, HuggingFaceAdapter
from tdm_lightning.vit.adapters.huggingface_layers import Bare, SeparateProjections


class Siglip2Adapter(HuggingFaceAdapter):
    """``Siglip2VisionModel`` on batches without padding."""

    def input_size(self, vit: Any) -> tuple[int, int, int]:
        """See :meth:`Adapter.input_size`: the grid that its position embeddings are of."""
        side = math.isqrt(vit.config.num_patches) * vit.config.patch_size
        return vit.config.num_channels, side, side

    def embed(self, vit: Any, images: Tensor, info: ModelInfo) -> Tokens:
        """See :meth:`Adapter.embed`."""
        pixels, shapes = self._patches(vit, images)
        return self.entering(vit, vit.embeddings(pixels, shapes), info)

    def encode(self, vit: Any, images: Tensor) -> Tensor:
        """See :meth:`Adapter.encode`."""
        pixels, shapes = self._patches(vit, images)
        return vit(pixels, None, shapes).last_hidden_state

    def _patches(self, vit: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Patches B×N×P of whole images and the shapes of their grids, B×2, as the model takes
        them.
        """
        check_shape(images, self.input_size(vit))
        patch = vit.config.patch_size
        # its processor puts the channels last within a patch
        pixels = F.pixel_unshuffle(images, patch).unflatten(1, (-1, patch * patch))
        pixels = pixels.permute(0, 3, 4, 2, 1).flatten(3).flatten(1, 2)
        shapes = torch.tensor([self.grid(vit, _size(images))], device=images.device)
        return pixels, shapes.expand(images.shape[0], -1)


def _size(images: Tensor) -> Size:
    return images.shape[-2], images.shape[-1]


LAYERS["siglip2.modeling_siglip2"] = (
    "Siglip2EncoderLayer",
    Bare(),
    "Siglip2Attention",
    SeparateProjections(),
)
ADAPTER = Siglip2Adapter()
