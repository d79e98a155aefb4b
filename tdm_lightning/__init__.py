"""Token reduction for timm Vision Transformers: TDM's token merger and the prune schedules it
stacks on.

Importing the package imports nothing: a name brings in the room that defines it when it is first
touched. Most need only torch and timm; :class:`TokenReductionClassifier` and
:class:`ImageNetDataModule` bring in Lightning and Hugging Face ``datasets``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tdm_lightning.version import __version__

if TYPE_CHECKING:
    from tdm_lightning import checkpoints, errors, export, flops, hub, metrics, sparsity
    from tdm_lightning.budget import solve_keep_rate
    from tdm_lightning.core import ModelInfo, Output, Reduction, Role, Seen, Tokens, Trace
    from tdm_lightning.data import ImageNetDataModule
    from tdm_lightning.importance import Chance, ClassAttention, Importance, ReceivedAttention
    from tdm_lightning.mergers import (
        Cluster,
        CriteriaMerger,
        Drop,
        EnergyMerger,
        Fuse,
        FusingMerger,
        Merger,
        PairMerger,
        RankMerger,
        TokenMerger,
        WardMerger,
    )
    from tdm_lightning.ops import kernels
    from tdm_lightning.schedules import (
        CountPerBlock,
        FewerPerBlock,
        RateAtBlocks,
        Schedule,
        SharePerBlock,
    )
    from tdm_lightning.sparsity import Structured, SViTE, Unstructured
    from tdm_lightning.strategies import (
        DPCKNN,
        IARED2,
        MCTF,
        MPM,
        TDM,
        AViT,
        DiffRate,
        Distillation,
        DyViT,
        EViT,
        EvoViT,
        MaMe,
        PiToMe,
        PSViT,
        Random,
        Requirements,
        SPViT,
        Stack,
        Strategy,
        ToFu,
        TokenReduction,
        ToMe,
        TopK,
        TrainingObjective,
        WardTDM,
    )
    from tdm_lightning.training import TokenReductionClassifier
    from tdm_lightning.vit import (
        Accelerated,
        Adapter,
        TokenReducedViT,
        accelerate,
        attach,
        detach,
        find_vit,
        linear_patches,
        register_adapter,
    )


__all__ = [
    "DPCKNN",
    "IARED2",
    "MCTF",
    "MPM",
    "TDM",
    "AViT",
    "Accelerated",
    "Adapter",
    "Chance",
    "ClassAttention",
    "Cluster",
    "CountPerBlock",
    "CriteriaMerger",
    "DiffRate",
    "Distillation",
    "Drop",
    "DyViT",
    "EViT",
    "EnergyMerger",
    "EvoViT",
    "FewerPerBlock",
    "Fuse",
    "FusingMerger",
    "ImageNetDataModule",
    "Importance",
    "MaMe",
    "Merger",
    "ModelInfo",
    "Output",
    "PSViT",
    "PairMerger",
    "PiToMe",
    "Random",
    "RankMerger",
    "RateAtBlocks",
    "ReceivedAttention",
    "Reduction",
    "Requirements",
    "Role",
    "SPViT",
    "SViTE",
    "Schedule",
    "Seen",
    "SharePerBlock",
    "Stack",
    "Strategy",
    "Structured",
    "ToFu",
    "ToMe",
    "TokenMerger",
    "TokenReducedViT",
    "TokenReduction",
    "TokenReductionClassifier",
    "Tokens",
    "TopK",
    "Trace",
    "TrainingObjective",
    "Unstructured",
    "WardMerger",
    "WardTDM",
    "__version__",
    "accelerate",
    "attach",
    "checkpoints",
    "detach",
    "errors",
    "export",
    "find_vit",
    "flops",
    "hub",
    "kernels",
    "linear_patches",
    "metrics",
    "register_adapter",
    "solve_keep_rate",
    "sparsity",
]


#: Where the public names are defined, from the ground floor up.
_ROOMS = (
    "core",
    "ops",
    "importance",
    "mergers",
    "schedules",
    "strategies",
    "sparsity",
    "vit",
    "budget",
    "training",
    "data",
)

#: What is reached as an attribute of the package: the rooms, and modules without a public name.
_MODULES = (*_ROOMS, "checkpoints", "errors", "export", "flops", "hub", "metrics")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    for room in _ROOMS if name in __all__ else ():
        module = import_module(f"{__name__}.{room}")
        if hasattr(module, name):
            globals()[name] = found = getattr(module, name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
