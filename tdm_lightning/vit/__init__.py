"""Vision Transformers, reduced."""

from tdm_lightning.vit.adapters import Adapter, register_adapter
from tdm_lightning.vit.attach import attach, detach
from tdm_lightning.vit.wrapper import TokenReducedViT

__all__ = ["Adapter", "TokenReducedViT", "attach", "detach", "register_adapter"]
