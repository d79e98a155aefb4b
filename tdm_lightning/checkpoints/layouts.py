"""How the published files name their weights. A new family is one more entry in :data:`LAYOUTS`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """One family of files.

    Attributes:
        name: what the family is called.
        recognises: whether a file's names belong to it.
        translate: the file's weights under timm's names; those of a strategy's own layers under ``strategy.…``, as
            :class:`~tdm_lightning.TokenReducedViT` names them. What it leaves out is not loaded.
    """

    name: str
    recognises: Callable[[Weights], bool]
    translate: Callable[[Weights], Weights]


def _is_deit(weights: Weights) -> bool:
    return "patch_embed.proj.weight" in weights and any(re.match(r"blocks\.\d+\.attn\.qkv\.weight", name) for name in weights)


def _from_deit(weights: Weights) -> Weights:
    """DeiT's names are timm's, but for the LayerScale of DeiT III."""
    return {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): value for name, value in weights.items()}


def _is_ours(weights: Weights) -> bool:
    return "vit.patch_embed.proj.weight" in weights


def _from_ours(weights: Weights) -> Weights:
    """What :class:`~tdm_lightning.TokenReducedViT` saves."""
    return {name.removeprefix("vit."): value for name, value in weights.items()}


#: Asked in this order, so the most specific come first. EViT and others that add no layer keep DeiT's names.
LAYOUTS: tuple[Layout, ...] = (
    Layout("tdm-lightning", _is_ours, _from_ours),
    Layout("deit", _is_deit, _from_deit),
)
