"""Lightning callbacks that work in any Trainer with any module that holds a timm ViT, reduced or
not.
"""

from tdm_lightning.callbacks.diversity_monitor import DiversityMonitor
from tdm_lightning.callbacks.flops_monitor import FLOPsMonitor
from tdm_lightning.callbacks.keep_rate_warmup import KeepRateWarmup
from tdm_lightning.callbacks.token_visualizer import TokenVisualizer

__all__ = ["DiversityMonitor", "FLOPsMonitor", "KeepRateWarmup", "TokenVisualizer"]
