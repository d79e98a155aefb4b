"""Top-1 accuracy."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


@torch.inference_mode()
def top1(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> float:
    """Share of the images, in [0, 1], whose largest logit is that of their label.

    Args:
        model: ready for evaluation.
        batches: images, B×C×H×W, and labels, B, on any device.
        classes: number of classes.
    """
    weight = next(model.parameters())
    metric = MulticlassAccuracy(classes, average="micro").to(weight.device)
    for images, labels in batches:
        metric.update(model(images.to(weight)).float(), labels.to(weight.device))
    return float(metric.compute())
