"""The diversity score of a token set: as a function, as a metric, and over the blocks of a ViT."""

from tdm_lightning.metrics.diversity import DiversityScore, Norm, diversity_score
from tdm_lightning.metrics.recorder import DiversityRecorder

__all__ = ["DiversityRecorder", "DiversityScore", "Norm", "diversity_score"]
