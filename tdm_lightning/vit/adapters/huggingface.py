"""``transformers``: ViT, DeiT, ViT-MSN, ViT-MAE, I-JEPA, DINOv2 and v3, CLIP, SigLIP. Nothing of it
is imported: classes are known by their names.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.core.info import ModelInfo
from tdm_lightning.core.positions import Positions
from tdm_lightning.core.tokens import Tokens
from tdm_lightning.errors import ReductionError, UnsupportedModelError
from tdm_lightning.strategies.base import Requirements
from tdm_lightning.vit.adapters.base import Size
from tdm_lightning.vit.adapters.huggingface_layers import (
    Bare,
    BeforeAndAfter,
    RotatedProjections,
    Scaled,
    SeparateProjections,
)
from tdm_lightning.vit.adapters.parts import (
    ATTENTIONS,
    BLOCKS,
    AttentionParts,
    BlockParts,
    PartsAdapter,
)
from tdm_lightning.vit.pooling import mean_over_patches

_OLD = "it is made as older versions of transformers make it; version 5.20 or newer is needed"
_MASK = "an attention mask names patches that may be merged by then; leave it out, or detach()"
#: Ways to compute attention that a bias of every key can be given to.
IMPLEMENTATIONS = ("eager", "sdpa", None)


_SEPARATE = SeparateProjections()
#: By the module of transformers: its layer's name and parts, its attention's name and parts.
LAYERS: dict[str, tuple[str, BlockParts, str, AttentionParts]] = {
    f"{module}.modeling_{module}": (f"{name}Layer", layer, f"{name}Attention", attention)
    for module, name, layer, attention in (
        ("vit", "ViT", BeforeAndAfter(), _SEPARATE),
        ("deit", "DeiT", BeforeAndAfter(), _SEPARATE),
        ("vit_msn", "ViTMSN", BeforeAndAfter(), _SEPARATE),
        ("vit_mae", "ViTMAE", BeforeAndAfter(), _SEPARATE),
        ("ijepa", "IJepa", BeforeAndAfter(), _SEPARATE),
        ("dinov2", "Dinov2", Scaled(), _SEPARATE),
        ("dinov2_with_registers", "Dinov2WithRegisters", Scaled(), _SEPARATE),
        ("dinov3_vit", "DINOv3ViT", Scaled(), RotatedProjections()),
    )
} | {
    "clip.modeling_clip": ("CLIPEncoderLayer", Bare(), "CLIPAttention", _SEPARATE),
    "siglip.modeling_siglip": ("SiglipEncoderLayer", Bare(), "SiglipAttention", _SEPARATE),
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
            raise UnsupportedModelError(_no_bias(chosen))
        for block in self.blocks(vit):
            _know(type(block))
        super().check(vit, requirements)
        for block in self.blocks(vit):
            for attn in BLOCKS[type(block)].attentions(block):
                if self.projections(attn) is None:
                    raise UnsupportedModelError(_OLD)

    def projections(self, attn: Any) -> Any:
        """The projection to queries; ``None``: it is not where it is looked for."""
        return getattr(attn, "q_proj", None)

    def embed(self, vit: Any, images: Tensor, info: ModelInfo) -> Tokens:
        """See :meth:`Adapter.embed`."""
        x = vit.embeddings(images)
        if isinstance(x, tuple):  # with what was masked
            x = x[0]
        if hasattr(vit, "pre_layrnorm"):  # as transformers spells it
            x = vit.pre_layrnorm(x)
        return self.entering(vit, x, info, self.given(vit, images))

    def encode(self, vit: Any, images: Tensor) -> Tensor:
        """See :meth:`Adapter.encode`."""
        found = vit(pixel_values=images)
        if hasattr(found, "feature_maps"):  # of a backbone, without its class token
            return found.feature_maps[-1].flatten(2).transpose(1, 2)
        return found.last_hidden_state

    def given(self, vit: Any, images: Tensor) -> dict[str, Any]:
        """What the model gives its layers beside tokens, by name."""
        if hasattr(vit, "rope_embeddings"):
            return {"position_embeddings": vit.rope_embeddings(images)}
        return {}

    def entering(
        self, vit: Any, x: Tensor, info: ModelInfo, given: Mapping[str, Any] | None = None
    ) -> Tokens:
        """See :meth:`Adapter.entering`; of what layers are given, the rotary tables are kept."""
        given = given or {}
        self.check_given(vit, given)
        tokens = super().entering(vit, x, info)
        positions = given.get("position_embeddings")
        if positions is None:
            return tokens
        cos, sin = positions
        table = torch.cat((sin, cos), dim=-1)
        return tokens.replace(positions=Positions(rope=(table,) * info.depth))

    def check_arguments(self, vit: Any, arguments: Mapping[str, Any]) -> None:
        """See :meth:`Adapter.check_arguments`. A mask is checked here, because layers are given one
        that hides nothing while a program is captured.
        """
        if any(_hides(arguments.get(name)) for name in ("attention_mask", "pixel_attention_mask")):
            raise ReductionError(_MASK)

    def check_given(self, vit: Any, given: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` for what merged tokens cannot follow."""
        if not torch.compiler.is_compiling() and _hides(given.get("attention_mask")):
            raise ReductionError(_MASK)
        chosen = vit.config._attn_implementation
        if chosen not in IMPLEMENTATIONS:
            raise ReductionError(_no_bias(chosen))
        capturing = sys.modules.get("transformers.utils.output_capturing")
        wanted = capturing._active_collector.get() if capturing is not None else None
        if given.get("output_attentions") or (wanted is not None and "attentions" in wanted):
            raise ReductionError(
                "attention maps are of merged tokens and are not given; leave output_attentions"
                " out, or detach()"
            )

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
        known = LAYERS.get(module)
        if library == "transformers" and known is not None and kind.__name__ == known[0]:
            BLOCKS[kind] = known[1]
            ATTENTIONS[getattr(sys.modules[kind.__module__], known[2])] = known[3]


def _no_bias(chosen: str) -> str:
    return (
        f"its attention is computed by {chosen!r}, which takes no bias of a key; choose 'sdpa' or"
        " 'eager' with set_attn_implementation()"
    )


def _hides(mask: Tensor | None) -> bool:
    """Whether a mask, boolean or to be added, hides a token; one whose values cannot be seen, while
    a program is captured, is taken to.
    """
    if mask is None or mask.is_meta:
        return False
    if torch.compiler.is_compiling():
        return True
    return not mask.all() if mask.dtype == torch.bool else bool((mask < -1e4).any())


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
