"""Small models of every strategy there is."""

from __future__ import annotations

import inspect
from typing import Any

import timm
import torch
from torch import Tensor, nn

import tdm_lightning as tdm
from tdm_lightning.ops import kernels

#: DeiT-T's blocks, fewer of them, on 49 patches.
SHAPE = {"img_size": 112, "depth": 4, "num_classes": 10}
_PATCHES = 49

#: No methods of their own, but what they are made of.
_PARTS = {"Strategy", "Stack", "TokenReduction", "Distillation"}

#: What a method needs to fit these models, where it is not two reducing blocks.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "DiffRate": {"counts": [_PATCHES, 40, 30, 30], "pruned": [_PATCHES, 44, 34, 30]},
    "ToMe": {"r": 5},
    "ToFu": {"r": 5},
    "MCTF": {"r": 5},
    "PSViT": {"counts": [45, 30, 20, 10]},
    "IARED2": {"groups": 2},
}


def strategies() -> dict[str, tdm.Strategy]:
    """Every public strategy by its name, new ones included, with settings for small models."""
    found = {}
    for name in tdm.__all__:
        kind = getattr(tdm, name)
        if isinstance(kind, type) and issubclass(kind, tdm.Strategy) and name not in _PARTS:
            layers = "layers" in inspect.signature(kind).parameters and name not in _ARGUMENTS
            found[name] = kind(
                **{**({"layers": (1, 2)} if layers else {}), **_ARGUMENTS.get(name, {})}
            )
    return found


class Formed(nn.Module):
    """A model whose passes run in one form of the kernels, under autocast if a type is given."""

    def __init__(self, model: nn.Module, form: Any, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.form, self.autocast = model, form, autocast
        self.training = model.training

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        enabled = self.autocast is not None
        with (
            kernels.use(self.form),
            torch.autocast(images.device.type, self.autocast, enabled=enabled),
        ):
            return self.model(images)


def small(strategy: tdm.Strategy, seed: int = 0) -> tdm.TokenReducedViT:
    """A small model under a strategy, on the CPU, with peaked attention, so that no decision is a
    near tie.
    """
    torch.manual_seed(seed)
    pool = {"global_pool": "avg"} if strategy.requires().pooling == "patches" else {}
    vit = timm.create_model("deit_tiny_patch16_224", **SHAPE, **pool).eval()
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if name.endswith(("qkv.weight", "fc1.weight", "fc2.weight")):
                parameter.normal_(std=0.1)
        vit.pos_embed.normal_(std=0.5)
    return tdm.attach(vit, strategy).eval()


def drawn(strategy: tdm.Strategy) -> bool:
    """Whether it draws at random, so that no two devices agree."""
    return isinstance(strategy, tdm.Random)
