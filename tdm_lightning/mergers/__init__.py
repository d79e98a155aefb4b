"""What N tokens become when fewer may stay: one file per merger."""

from tdm_lightning.mergers.base import Merger
from tdm_lightning.mergers.cluster import Cluster
from tdm_lightning.mergers.criteria_merger import CriteriaMerger
from tdm_lightning.mergers.drop import Drop
from tdm_lightning.mergers.energy_merger import EnergyMerger
from tdm_lightning.mergers.fuse import Fuse
from tdm_lightning.mergers.fusing_merger import FusingMerger
from tdm_lightning.mergers.pair_merger import PairMerger
from tdm_lightning.mergers.rank_merger import RankMerger
from tdm_lightning.mergers.token_merger import TokenMerger
from tdm_lightning.mergers.ward_merger import WardMerger

__all__ = [
    "Cluster",
    "CriteriaMerger",
    "Drop",
    "EnergyMerger",
    "Fuse",
    "FusingMerger",
    "Merger",
    "PairMerger",
    "RankMerger",
    "TokenMerger",
    "WardMerger",
]
