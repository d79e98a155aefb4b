"""Foreign ViT classes: one file for each foreign module, with all that differs there."""

from tdm_lightning.vit.adapters import (  # noqa: F401 - each registers its classes
    beit,
    eva,
    naflexvit,
    vision_transformer,
    vision_transformer_relpos,
)
from tdm_lightning.vit.adapters.base import Adapter
from tdm_lightning.vit.adapters.registry import (
    adapter_for,
    class_names,
    find_adapter,
    grid_size,
    input_size,
    model_info,
    patch_count,
    register_adapter,
    supported_classes,
)

__all__ = [
    "Adapter",
    "adapter_for",
    "class_names",
    "find_adapter",
    "grid_size",
    "input_size",
    "model_info",
    "patch_count",
    "register_adapter",
    "supported_classes",
]
