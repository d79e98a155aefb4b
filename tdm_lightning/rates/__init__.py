"""Rates learned on data: how many tokens each block should leave at a budget."""

from tdm_lightning.rates.distortion import distortion
from tdm_lightning.rates.search import Learned, learn_counts, most_steps

__all__ = ["Learned", "distortion", "learn_counts", "most_steps"]
