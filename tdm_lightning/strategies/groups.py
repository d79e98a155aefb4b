"""Optimizer groups of strategies whose own layers learn faster than the model they are put on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def paced_groups(
    model: Any, weight_decay: float, backbone: Mapping[str, float], own: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Groups for :meth:`Strategy.param_groups`: the timm model at one pace, the strategy's own
    layers at another.

    Biases and norms do not decay. Class token, positions and what else timm exempts from decay are
    in no group: DynamicViT's recipe, and those made from it, never train them.

    Args:
        model: the reduced model.
        weight_decay: of the parameters that decay.
        backbone: what its groups hold beside parameters and decay: ``lr`` and perhaps ``lr_scale``
            and ``freeze_epochs``.
        own: likewise of the strategy's own.
    """
    fixed = model.no_weight_decay()
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": decay, **pace}
        for pace in (backbone, own)
        for decay in (weight_decay, 0.0)
    ]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in fixed:
            groups[2 * name.startswith("strategy.") + (parameter.ndim <= 1)]["params"].append(
                parameter
            )
    return [group for group in groups if group["params"]]
