"""Patch slimming: which patch positions each block of a trained ViT must compute. Usable without
Lightning.
"""

from tdm_lightning.slimming.impact import attention_maps, impact_scores, influence_through
from tdm_lightning.slimming.search import Slimmed, SlimmedBlock, search, select

__all__ = [
    "Slimmed",
    "SlimmedBlock",
    "attention_maps",
    "impact_scores",
    "influence_through",
    "search",
    "select",
]
