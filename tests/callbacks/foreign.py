"""A LightningModule that knows nothing of this library, and loaders for it."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F
from torch.utils.data import DataLoader


class Foreign(LightningModule):
    """Holds its model as ``encoder``; batches are tuples or dicts."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def _loss(self, batch):
        images, labels = (
            (batch["pixels"], batch["label"]) if isinstance(batch, dict) else (batch[1], batch[0])
        )
        return F.cross_entropy(self.encoder(images), labels)

    def training_step(self, batch, batch_idx):
        return self._loss(batch)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self._loss(batch)

    def test_step(self, batch, batch_idx):
        self._loss(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-4)


def small_vit(**changes):
    torch.manual_seed(0)
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 4,
        "num_heads": 2,
        "num_classes": 3,
    }
    return VisionTransformer(**{**settings, **changes})


def loader(images=12, batch_size=4, form="tuple", size=32):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(images, 3, size, size, generator=generator)
    if form == "dict":
        data = [{"label": i % 3, "path": "x.png", "pixels": pixels[i]} for i in range(images)]
    else:
        data = [(i % 3, pixels[i]) for i in range(images)]
    return DataLoader(data, batch_size=batch_size)


def trainer(tmp_path, *callbacks, **changes):
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": CSVLogger(tmp_path, name="", version=""),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**settings, **changes})
