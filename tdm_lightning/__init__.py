"""Token reduction for timm Vision Transformers: TDM's token merger and the prune schedules it
stacks on.

The names here need only torch and timm. :class:`TokenReductionClassifier` and
:class:`ImageNetDataModule` bring in Lightning and Hugging Face ``datasets`` when they are first
touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdm_lightning import checkpoints, export, flops, metrics, sparsity
from tdm_lightning.budget import solve_keep_rate
from tdm_lightning.core.tokens import Output, Role, Tokens, Trace
from tdm_lightning.mergers import TokenMerger
from tdm_lightning.sparsity import Structured, SViTE, Unstructured
from tdm_lightning.strategies import (
    DPCKNN,
    IARED2,
    TDM,
    AViT,
    DyViT,
    EViT,
    EvoViT,
    PSViT,
    Random,
    SPViT,
    Stack,
    Strategy,
    ToMe,
    TopK,
)
from tdm_lightning.version import __version__
from tdm_lightning.vit import TokenReducedViT, attach, detach

if TYPE_CHECKING:
    from tdm_lightning.data import ImageNetDataModule
    from tdm_lightning.training import TokenReductionClassifier


__all__ = [
    "DPCKNN",
    "IARED2",
    "TDM",
    "AViT",
    "DyViT",
    "EViT",
    "EvoViT",
    "ImageNetDataModule",
    "Output",
    "PSViT",
    "Random",
    "Role",
    "SPViT",
    "SViTE",
    "Stack",
    "Strategy",
    "Structured",
    "ToMe",
    "TokenMerger",
    "TokenReducedViT",
    "TokenReductionClassifier",
    "Tokens",
    "TopK",
    "Trace",
    "Unstructured",
    "__version__",
    "attach",
    "checkpoints",
    "detach",
    "export",
    "flops",
    "metrics",
    "solve_keep_rate",
    "sparsity",
]

_LAZY = {
    "TokenReductionClassifier": "tdm_lightning.training",
    "ImageNetDataModule": "tdm_lightning.data",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
