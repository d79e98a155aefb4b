"""Methods side by side on one machine: cost, speed, memory and accuracy."""

from tdm_lightning.compare.methods import Method, posters_strategies
from tdm_lightning.compare.run import Comparison, Plan, measure, prepare
from tdm_lightning.compare.timing import speedup

__all__ = ["Comparison", "Method", "Plan", "measure", "posters_strategies", "prepare", "speedup"]
