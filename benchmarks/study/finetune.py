"""The brief training that every method gets alike."""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass

from lightning.pytorch import Trainer

from tdm_lightning.core.checks import check_count, check_number
from tdm_lightning.data import ImageNetDataModule
from tdm_lightning.errors import SettingError
from tdm_lightning.strategies import Distillation, Stack, Strategy
from tdm_lightning.training.module import TokenReductionClassifier


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune: AdamW on a cosine from the learning rate to 0, without warm-up, mixup,
    cutmix or drop-path.

    Attributes:
        train_images: images to see; more than there are: some again.
        lr: learning rate at the start.
        weight_decay: as in :class:`~tdm_lightning.TokenReductionClassifier`.
        distill: weight of the divergence from the plain model's answers; 0: none.

    Raises:
        TypeError, ValueError: if a number is none or out of range.
    """

    train_images: int = 6000
    lr: float = 2e-4
    weight_decay: float = 0.05
    distill: float = 0.0

    def __post_init__(self) -> None:
        check_count(self.train_images, "train_images", least=0)
        if not 0 < self.lr < math.inf:
            raise SettingError(f"lr must be a positive learning rate, got {self.lr!r}")
        check_number(self.distill, "distill")

    def arguments(self, lr_factor: float) -> dict[str, float | None]:
        """For :class:`~tdm_lightning.TokenReductionClassifier`; the factor: see
        :class:`~benchmarks.study.plan.Method`.
        """
        return {
            "lr": self.lr * lr_factor,
            "weight_decay": self.weight_decay,
            "min_lr": 0.0,
            "warmup_epochs": 0,
            "drop_path": 0.0,
            "mixup": 0.0,
            "cutmix": 0.0,
        }


def taught(strategy: Strategy, recipe: Recipe) -> Strategy:
    """The method, beside distillation where the recipe has some."""
    return Stack([Distillation(recipe.distill), strategy]) if recipe.distill else strategy


def finetune(module: TokenReductionClassifier, data: ImageNetDataModule, recipe: Recipe) -> None:
    """Train a model in place; seed the generators before.

    Args:
        module: made with :meth:`Recipe.arguments`.
        data: set up to fit; its training split is shuffled: the seed decides which images are seen.
        recipe: for how long.
    """
    # it may have been evaluated before, and Lightning leaves each part in the mode it is in
    module.train()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=math.ceil(recipe.train_images / data.hparams.batch_size),
            max_epochs=-1,
            devices=1,
            gradient_clip_val=1.0,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(module, data.train_dataloader())
