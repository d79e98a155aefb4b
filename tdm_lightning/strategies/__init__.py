"""Token-reduction methods, one file per published system."""

from tdm_lightning.strategies.avit import AViT
from tdm_lightning.strategies.base import Requirements, Strategy
from tdm_lightning.strategies.diffrate import DiffRate
from tdm_lightning.strategies.distill import Distillation
from tdm_lightning.strategies.dpcknn import DPCKNN
from tdm_lightning.strategies.dyvit import DyViT
from tdm_lightning.strategies.evit import EViT
from tdm_lightning.strategies.evovit import EvoViT
from tdm_lightning.strategies.iared2 import IARED2
from tdm_lightning.strategies.mame import MaMe
from tdm_lightning.strategies.mctf import MCTF
from tdm_lightning.strategies.mpm import MPM
from tdm_lightning.strategies.objective import TrainingObjective
from tdm_lightning.strategies.pitome import PiToMe
from tdm_lightning.strategies.psvit import PSViT
from tdm_lightning.strategies.random import Random
from tdm_lightning.strategies.reduction import TokenReduction
from tdm_lightning.strategies.spvit import SPViT
from tdm_lightning.strategies.stack import Stack
from tdm_lightning.strategies.tdm import TDM
from tdm_lightning.strategies.tofu import ToFu
from tdm_lightning.strategies.tome import ToMe
from tdm_lightning.strategies.topk import TopK
from tdm_lightning.strategies.ward_tdm import WardTDM

__all__ = [
    "DPCKNN",
    "IARED2",
    "MCTF",
    "MPM",
    "TDM",
    "AViT",
    "DiffRate",
    "Distillation",
    "DyViT",
    "EViT",
    "EvoViT",
    "MaMe",
    "PSViT",
    "PiToMe",
    "Random",
    "Requirements",
    "SPViT",
    "Stack",
    "Strategy",
    "ToFu",
    "ToMe",
    "TokenReduction",
    "TopK",
    "TrainingObjective",
    "WardTDM",
]
