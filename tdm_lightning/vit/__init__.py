"""Vision Transformers, reduced."""

from tdm_lightning.vit.accelerate import Accelerated, accelerate
from tdm_lightning.vit.adapters import Adapter, register_adapter
from tdm_lightning.vit.attach import attach, detach
from tdm_lightning.vit.find import find_vit
from tdm_lightning.vit.patches import linear_patches
from tdm_lightning.vit.wrapper import TokenReducedViT

__all__ = [
    "Accelerated",
    "Adapter",
    "TokenReducedViT",
    "accelerate",
    "attach",
    "detach",
    "find_vit",
    "linear_patches",
    "register_adapter",
]
