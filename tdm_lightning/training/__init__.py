"""Training: the LightningModule and DeiT's recipe."""

from tdm_lightning.training.module import TokenReductionClassifier

__all__ = ["TokenReductionClassifier"]
