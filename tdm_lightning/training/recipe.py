"""The training recipe of DeiT, put together from timm's parts."""

from __future__ import annotations

from typing import Any

from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from tdm_lightning.errors import SettingError


def make_criterion(mixing: bool, label_smoothing: float) -> nn.Module:
    """Cross entropy for what the targets are.

    Args:
        mixing: targets are soft, B×classes: mixup or cutmix is on and already smooths them.
        label_smoothing: share of the target spread over all classes, for labels, B.
    """
    if mixing:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(label_smoothing) if label_smoothing else nn.CrossEntropyLoss()


def make_cosine(
    optimizer: Optimizer, total_steps: int, warmup_steps: int, warmup_lr: float, min_lr: float
) -> CosineLRScheduler:
    """Timm's cosine, per optimizer step: linear from ``warmup_lr``, then a cosine from each group's
    lr down to ``min_lr``.

    Raises:
        ValueError: if the warm-up is as long as the run.
    """
    if warmup_steps >= total_steps:
        raise SettingError(
            f"the warm-up takes {warmup_steps} of the run's {total_steps} steps; lower"
            " model.warmup_epochs or train longer"
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps - warmup_steps,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=warmup_lr,
        # the cosine begins at its peak, where DeiT's scripts enter it a little later
        warmup_prefix=True,
        t_in_epochs=False,
    )


def drop_odd(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All images but the last where their number is odd: timm's mixup mixes them in pairs."""
    keep = len(images) - len(images) % 2
    return images[:keep], labels[:keep]


def freeze(groups: list[dict[str, Any]], epoch: int) -> None:
    """Hold the learning rate of groups at 0 during their first ``freeze_epochs`` epochs."""
    for group in groups:
        if epoch < group.get("freeze_epochs", 0):
            group["lr"] = 0.0
