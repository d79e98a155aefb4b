"""The diversity score of a token set: as a function, as a metric, and over the blocks of a ViT."""

from tdm_lightning.metrics.diversity import DiversityScore, Norm, diversity_score

__all__ = ["DiversityScore", "Norm", "diversity_score"]
