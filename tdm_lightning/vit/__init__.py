"""timm Vision Transformers, reduced."""

from tdm_lightning.vit.attach import attach, detach
from tdm_lightning.vit.wrapper import TokenReducedViT

__all__ = ["TokenReducedViT", "attach", "detach"]
