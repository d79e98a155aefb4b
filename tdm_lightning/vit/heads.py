"""Pooling after reduction: a token that stands for several patches counts as many times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tdm_lightning.vit.families import class_rows, family_of


def rows_read(vit: Any) -> int | None:
    """How many leading tokens the model's head reads; ``None`` where it pools over patches."""
    return class_rows(vit) or None if vit.global_pool == "token" else None


def needs_sizes(vit: Any) -> bool:
    """Whether the model's head pools over patch tokens, so that their sizes matter."""
    return getattr(vit, "global_pool", "token") in ("avg", "avgmax", "max", "map", "prr")


def forward_head(
    vit: Any, features: Tensor, size: Tensor | None = None, pre_logits: bool = False
) -> Tensor:
    """The head of the timm model on reduced tokens.

    Average pooling becomes the mean over *patches*, that is over tokens weighted by ``size``;
    attention pooling adds ``log(size)`` to the logits, which equals letting each token appear
    ``size`` times. A token of size 0 is padding and counts nowhere. Class-token pooling needs no
    sizes.

    Args:
        vit: the timm model.
        features: tokens after the final norm, B×T×C, prefix tokens first.
        size: patches each patch token stands for, B×(T-prefix); ``None``: one each.
        pre_logits: stop before the classifier.

    Returns:
        What ``vit.forward_head`` returns, usually B×classes.
    """
    if size is None or not needs_sizes(vit):
        return vit.forward_head(features, pre_logits=pre_logits)
    whole = family_of(vit).pools_prefix(vit)
    prefix = vit.num_prefix_tokens
    weight = nn.functional.pad(size, (prefix, 0), value=1.0) if whole else size
    x = features if whole else features[:, prefix:]
    if vit.global_pool in ("map", "prr"):
        pooled = vit.attn_pool(x, attn_mask=weight.log().to(x.dtype)[:, None, None, :])
        pooled = vit.head_drop(vit.fc_norm(pooled))
        return pooled if pre_logits else vit.head(pooled)
    share = weight / weight.sum(dim=1, keepdim=True).clamp(
        min=1
    )  # an image may have lost all of its patches
    pooled = (x * share.to(x.dtype).unsqueeze(-1)).sum(dim=1, keepdim=True)
    if vit.global_pool in ("avgmax", "max"):
        largest = x.masked_fill((weight == 0).unsqueeze(-1), -torch.inf).amax(dim=1, keepdim=True)
        pooled = largest if vit.global_pool == "max" else 0.5 * (pooled + largest)
    # Present the pooled feature as the only patch: whatever else the model's head does stays its
    # own.
    only = pooled if whole else torch.cat((features[:, :prefix], pooled), dim=1)
    return vit.forward_head(only, pre_logits=pre_logits)
