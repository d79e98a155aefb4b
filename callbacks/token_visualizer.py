"""Pictures of what becomes of validation images."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from tdm_lightning.callbacks.batches import first_images
from tdm_lightning.callbacks.output import check_folder, output_folder

from tdm_lightning.core.checks import check_count
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.visualize.panels import panels
from tdm_lightning.visualize.sheet import arrange, save_panels, split_rows, titles
from tdm_lightning.vit import TokenReducedViT, attach
from tdm_lightning.vit.find import find_vit


class TokenVisualizer(Callback):
    """Draws :func:`~tdm_lightning.visualize.panels` of the first images that are validated or
    tested.

    Written as ``tokens/<stage>_<image>.png``, with the epoch in the name during ``fit``, and handed
    to every logger whose experiment takes images (``add_image``, as TensorBoard's does). Nothing is
    written under ``fast_dev_run``. A plain ViT, or one whose keep rate is still 1, shows only the
    originals.

    Args:
        num_images: images per validation, from the start of the first loader.
        every_n_epochs: epochs between drawings during ``fit``.
        dir: folder for the pictures; ``tokens`` in the logger's by default.
        vit: path of the ViT in the LightningModule, where it holds several.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range; at the start of
            the run, if the module does not hold exactly one ViT, or ``dir`` cannot be written; in
            the run, if a batch holds no images.
    """

    def __init__(
        self,
        num_images: int = 4,
        every_n_epochs: int = 1,
        dir: str | None = None,
        vit: str | None = None,
    ) -> None:
        self.num_images = check_count(num_images, "num_images")
        self.every_n_epochs = check_count(every_n_epochs, "every_n_epochs")
        self.dir = dir
        self.vit = vit
        self._drawn = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is one ViT, and a place for the pictures."""
        find_vit(pl_module, self.vit)
        check_folder(trainer, self.dir)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew, every so many epochs."""
        due = trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._drawn = 0 if due and not trainer.sanity_checking else self.num_images

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw as many images as are still wanted."""
        stage = "test" if trainer.testing else "val"
        name = f"{stage}_epoch{trainer.current_epoch:03d}" if trainer.state.fn == "fit" else stage
        if self._drawn >= self.num_images:
            return
        images = first_images(batch)[: self.num_images - self._drawn]
        first, self._drawn = self._drawn, self._drawn + len(images)
        folder = output_folder(
            trainer, self.dir
        )  # on all processes, though only the first one draws
        if not trainer.is_global_zero:
            return
        model = find_vit(pl_module, self.vit)
        reduced = model if isinstance(model, TokenReducedViT) else attach(model, Strategy())
        for index, image in enumerate(images, start=first):
            rows = split_rows(panels(reduced, image))
            if folder is not None:
                directory = folder / "tokens" if self.dir is None else folder
                save_panels(
                    directory / f"{name}_{index}.png", rows, titles=titles(reduced), colours=256
                )
            for logger in trainer.loggers:
                experiment: Any = getattr(logger, "experiment", None)
                if hasattr(experiment, "add_image"):
                    picture = np.asarray(arrange(rows, titles=titles(reduced)))
                    tag = f"tokens/{stage}_{index}"
                    experiment.add_image(tag, picture, trainer.global_step, dataformats="HWC")

    on_test_batch_end = on_validation_batch_end
