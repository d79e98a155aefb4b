"""Anneals the keep rate from 1 while training."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from tdm_lightning.core.checks import check_count
from tdm_lightning.errors import SettingTypeError
from tdm_lightning.vit import TokenReducedViT
from tdm_lightning.vit.find import find_vit


def cosine_keep_rate(keep_rate: float, share: float) -> float:
    """The keep rate after a share of the warm-up: ``κ + (1-κ)·(1 + cos(π·share))/2``, 1 before
    it and κ after it.

    >>> [cosine_keep_rate(0.7, share) for share in (-1, 0, 0.5, 1)]
    [1.0, 1.0, 0.85, 0.7]
    """
    if share <= 0:
        return 1.0
    if share >= 1:
        return keep_rate
    return keep_rate + (1 - keep_rate) * (math.cos(math.pi * share) + 1) * 0.5


class KeepRateWarmup(Callback):
    """Lets a model learn with all its tokens first, then with fewer and fewer (EViT, Liang et al.,
    ICLR 2022).

    The keep rate is 1 until ``start_epoch``, falls along a cosine with every batch for ``epochs``
    epochs, and is the strategy's own from then on. Validation during training uses the current
    rate; a ``validate``, ``test`` or ``predict`` of its own, and everything after ``fit``, the
    strategy's.

    The rate follows from epoch and batch alone, so a resumed run goes on where it was, and
    accumulated gradients do not matter. With a loader that does not tell its length it falls once
    per epoch. The official setting for 300 epochs is the default.

    Args:
        start_epoch: the first epoch, from 0, in which the rate falls.
        epochs: how long it falls.
        vit: path of the reduced model in the LightningModule, where it holds several ViTs.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range; at the start of
            ``fit``, if the module's ViT is not reduced or its strategy has no keep rate.
    """

    def __init__(self, start_epoch: int = 10, epochs: int = 100, vit: str | None = None) -> None:
        self.start_epoch = check_count(start_epoch, "start_epoch", least=0)
        self.epochs = check_count(epochs, "epochs")
        self.vit = vit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is a keep rate to warm up."""
        if stage == "fit":
            self._strategy(pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The check before training validates as the first epoch would."""
        self._set(trainer, pl_module, 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the epoch's first rate, before other callbacks look at it."""
        self._set(trainer, pl_module, 0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set this batch's rate."""
        self._set(trainer, pl_module, batch_idx)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the strategy its own rate back."""
        self._strategy(pl_module).current_keep_rate = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """As after training."""
        if trainer.state.fn == "fit":
            self.on_fit_end(trainer, pl_module)

    def _set(self, trainer: Trainer, pl_module: LightningModule, batch: int) -> None:
        strategy = self._strategy(pl_module)
        batches = trainer.num_training_batches
        if not 0 < batches < float("inf"):
            batches, batch = 1, 0
        batches_done = (trainer.current_epoch - self.start_epoch) * batches + batch
        strategy.current_keep_rate = cosine_keep_rate(
            strategy.keep_rate, batches_done / (self.epochs * batches)
        )

    def _strategy(self, pl_module: LightningModule) -> Any:
        model = find_vit(pl_module, self.vit)
        if not isinstance(model, TokenReducedViT):
            raise SettingTypeError(
                "KeepRateWarmup needs a ViT that reduces its tokens, but"
                f" {type(pl_module).__name__} holds a plain {type(model).__name__}; attach a"
                " strategy to it, or leave this callback out"
            )
        if getattr(model.strategy, "keep_rate", None) is None:
            raise SettingTypeError(
                f"KeepRateWarmup anneals a keep rate, and {type(model.strategy).__name__} has none;"
                " leave this callback out"
            )
        return model.strategy
