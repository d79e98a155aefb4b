"""Image classification sets from Hugging Face ``datasets``, prepared the way a timm model wants
them.
"""

from tdm_lightning.data.module import ImageNetDataModule

__all__ = ["ImageNetDataModule"]
