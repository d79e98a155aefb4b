"""What a forward pass costs, in the run's own image size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, TypeGuard

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from tdm_lightning.callbacks.batches import batches_in_loader, first_images, is_sampled
from torch import Tensor, nn

from tdm_lightning.core.checks import check_count
from tdm_lightning.core.shards import whole
from tdm_lightning.flops import ImageCosts, image_costs, mac_report
from tdm_lightning.vit import TokenReducedViT
from tdm_lightning.vit.adapters import grid_size, model_info
from tdm_lightning.vit.find import find_vit


class FLOPsMonitor(Callback):
    """Prints and logs multiply-accumulates and token counts of the module's ViT, for inference on
    images of the batches' size.

    Printed when the first batch of ``fit``, ``validate`` or ``test`` arrives; logged once per
    epoch, since a keep rate may be warming up: ``flops/gmacs`` (what the papers call GFLOPs),
    ``flops/reduction`` (the share saved against the plain model, 0 for a plain one) and
    ``tokens/block_XX``, the patch tokens after each block, from 0. Counted on the meta device: it
    costs no memory, and about as much time as the Python of one pass.

    Where a strategy decides image by image how many tokens it keeps, real images are counted: the
    mean over a few batches spread evenly over the loader, printed at the end of the first epoch.
    ``flops/gmacs`` is then what a batch costs per image, padding included; beside it stand
    ``flops/gmacs_alone``, the mean of what the images would cost one by one, and the standard
    deviations over images, ``flops/gmacs_alone_std`` and ``tokens/block_XX_std``.

    Args:
        max_batches: how many batches to count for such strategies, per epoch and process.
        max_images: how many images of each of them to count one by one.
        vit: path of the ViT in the LightningModule, where it holds several.

    Attributes:
        costs: the latest figures, as they are logged.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range; at the start of
            the run, if the module does not hold exactly one ViT; with the first batch, if that
            holds no images.
    """

    def __init__(self, max_batches: int = 8, vit: str | None = None, max_images: int = 8) -> None:
        self.max_batches = check_count(max_batches, "max_batches")
        self.max_images = check_count(max_images, "max_images")
        self.vit = vit
        self.costs: dict[str, float] = {}
        self._costs: list[dict[str, float]] = []
        self._images: list[ImageCosts] = []
        self._printed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there is one ViT."""
        find_vit(pl_module, self.vit)
        self._costs, self._images, self._printed = [], [], False

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count; in validation only where it is all of the run."""
        if trainer.state.fn == "fit" and not trainer.training:
            return
        vit = find_vit(pl_module, self.vit)
        if is_adaptive(vit):
            if is_sampled(batch_idx, batches_in_loader(trainer, dataloader_idx), self.max_batches):
                images = first_images(batch)
                with whole(vit):
                    self._costs.append(cost(vit, images=images))
                    self._images.append(image_costs(vit, images[: self.max_images]))
        elif not self._costs:
            shape = first_images(batch).shape[1:]
            with whole(vit):
                self._costs.append(cost(vit, input_size=(shape[0], shape[1], shape[2])))
            self._print_once(pl_module, vit)

    on_validation_batch_start = on_test_batch_start = on_train_batch_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log; in validation only where it is all of the run."""
        if self._costs and (trainer.state.fn != "fit" or trainer.training):
            self._print_once(pl_module, find_vit(pl_module, self.vit))
            self.costs = {**_mean(self._costs), **image_statistics(self._images)}
            self._costs, self._images = [], []
            pl_module.log_dict(self.costs, sync_dist=True)

    on_validation_epoch_end = on_test_epoch_end = on_train_epoch_end

    def _print_once(self, pl_module: LightningModule, vit: nn.Module) -> None:
        if not self._printed:
            self._printed = True
            pl_module.print(describe({**_mean(self._costs), **image_statistics(self._images)}, vit))


def cost(
    vit: nn.Module, input_size: tuple[int, int, int] | None = None, images: Tensor | None = None
) -> dict[str, float]:
    """What is logged for a ViT: ``flops/gmacs``, ``flops/reduction`` and ``tokens/block_XX``;
    arguments as ``mac_report``.
    """
    report = mac_report(vit, input_size, images)
    counts: list[float] = [block.tokens for block in report.blocks]
    if not counts:  # a plain model keeps all
        size = input_size[1:] if images is None else images.shape[-2:]  # type: ignore[index]
        depth = model_info(vit).depth
        counts = [math.prod(grid_size(vit, (size[0], size[1])))] * depth
    tokens = {f"tokens/block_{index:02d}": float(count) for index, count in enumerate(counts)}
    return {"flops/gmacs": report.backbone / 1e9, "flops/reduction": report.reduction, **tokens}


def image_statistics(costs: Sequence[ImageCosts]) -> dict[str, float]:
    """How much images differ: what is logged beside :func:`cost` for adaptive strategies; nothing
    for others.
    """
    if not costs:
        return {}
    macs, tokens = (
        torch.cat([each.macs for each in costs]),
        torch.cat([each.tokens for each in costs]),
    )
    deviations = tokens.std(dim=0, correction=0).tolist()
    return {
        "flops/gmacs_alone": macs.mean().item() / 1e9,
        "flops/gmacs_alone_std": macs.std(correction=0).item() / 1e9,
        **{
            f"tokens/block_{index:02d}_std": deviation for index, deviation in enumerate(deviations)
        },
    }


def describe(costs: dict[str, float], vit: nn.Module) -> str:
    """Costs in words, for a ViT in its present state."""
    gmacs, reduction = costs["flops/gmacs"], costs["flops/reduction"]
    counts = {
        key: count
        for key, count in costs.items()
        if key.startswith("tokens/") and not key.endswith("_std")
    }
    tokens = " ".join(
        f"{count:.4g}" + (f"±{costs[f'{key}_std']:.2g}" if f"{key}_std" in costs else "")
        for key, count in counts.items()
    )
    if not isinstance(vit, TokenReducedViT):
        return (
            f"{type(vit).__name__}: {gmacs:.4g} GMACs per image; patch tokens after each block:"
            f" {tokens}"
        )
    if "flops/gmacs_alone" in costs:
        alone, deviation = costs["flops/gmacs_alone"], costs["flops/gmacs_alone_std"]
        tokens = f"{tokens}; one by one the images take {alone:.4g}±{deviation:.2g} GMACs"
    rate = vit.strategy.current_keep_rate
    now = "" if rate is None else f" at the current keep rate {rate:.3g}"
    return (
        f"{type(vit.strategy).__name__}: {gmacs:.4g} GMACs per image{now}, {reduction:.1%} less"
        f" than the plain model's {gmacs / (1 - reduction):.4g}; patch tokens after each block:"
        f" {tokens}"
    )


def is_adaptive(vit: nn.Module) -> TypeGuard[TokenReducedViT]:
    """Whether its images keep different numbers of tokens."""
    return isinstance(vit, TokenReducedViT) and vit.strategy.adaptive


def _mean(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(each[name] for each in costs) for name in costs[0]}
