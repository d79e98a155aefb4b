"""A tiny model of every class that can be reduced."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tdm_lightning.cli.models import EXAMPLES, library_of
from tdm_lightning.vit import find_vit
from tdm_lightning.vit.create import create_vit

#: Images are of this many pixels, 8×8 patches.
SIDE = 32
_TIMM = {"img_size": SIDE, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3}
_HUGGING_FACE = {
    "image_size": SIDE,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
#: Arguments that differ, by the class.
_OTHER: dict[str, dict[str, Any]] = {
    "NaFlexVit": {
        **{key: value for key, value in _TIMM.items() if key != "img_size"},
        "pretrained_cfg_overlay": {"input_size": (3, SIDE, SIDE)},
    },
    "CLIPVisionModel": {"vision_config": _HUGGING_FACE, "text_config": {"num_hidden_layers": 1}},
    "SiglipVisionModel": {"vision_config": _HUGGING_FACE, "text_config": {"num_hidden_layers": 1}},
    "Siglip2VisionModel": {
        "vision_config": {**_HUGGING_FACE, "num_patches": 64},
        "text_config": {"num_hidden_layers": 1},
    },
    "ViTMAEModel": {**_HUGGING_FACE, "mask_ratio": 0.0},
    "BeitModel": {**_HUGGING_FACE, "use_relative_position_bias": True},
    "Data2VecVisionModel": {**_HUGGING_FACE, "use_relative_position_bias": True},
}


def tiny(path: str, seed: int = 0) -> nn.Module:
    """A model of a class by its full name, its weights random and all of them with a say."""
    torch.manual_seed(seed)
    library, name = library_of(path), path.rpartition(".")[2]
    assert library is not None
    model = find_vit(_make(path, library.name, name))
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.15)
    return model.eval()


def _make(path: str, library: str, name: str) -> nn.Module:
    if library == "torchvision":
        from torchvision.models import VisionTransformer

        return VisionTransformer(SIDE, 4, 4, 3, 48, 96, num_classes=10)
    if library == "open_clip":
        from open_clip.transformer import VisionTransformer as Tower

        return Tower(SIDE, 4, 48, 4, 3, 2, output_dim=16)
    if library == "transformers" and path not in EXAMPLES:  # a backbone
        import transformers

        config = getattr(transformers, name.replace("Backbone", "Config"))
        return getattr(transformers, name)(config(**_HUGGING_FACE))
    usual = _TIMM if library == "timm" else _HUGGING_FACE
    prefix = "hf:" if library == "transformers" else ""
    return create_vit(f"{prefix}{EXAMPLES[path]}", **_OTHER.get(name, usual))
