"""Token-reduction methods, one file per published system."""

from tdm_lightning.strategies.base import Strategy
from tdm_lightning.strategies.evit import EViT
from tdm_lightning.strategies.merger import TokenMerger
from tdm_lightning.strategies.tdm import TDM

__all__ = ["TDM", "EViT", "Strategy", "TokenMerger"]
