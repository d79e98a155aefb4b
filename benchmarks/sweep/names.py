"""timm's names, and what can be said of a model before any of its memory is taken."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.layers import GluMlp
from torch import nn

from tdm_lightning.errors import SettingError

#: timm's modules of Vision Transformers whose tokens all attend to each other.
MODULES = (
    "vision_transformer",
    "deit",
    "eva",
    "beit",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "naflexvit",
)


@dataclass(frozen=True)
class Facts:
    """What a timm model is.

    Attributes:
        kind: its class.
        block: the class of its blocks; empty without blocks.
        attention: the class of their attention; empty where the block holds the projections itself.
        depth: number of blocks.
        width: channels of a token.
        heads: attention heads of a block; 0 where they cannot be told.
        parameters: of the whole model.
        key_heads: heads of the keys in each block, where queries may have more; empty otherwise.
        gated: channels of an MLP's first layer that makes values and their gates in one go; 0
            otherwise.
        fixed_width: whether a convolutional network in front sets the width.
    """

    kind: str
    block: str
    attention: str
    depth: int
    width: int
    heads: int
    parameters: int
    key_heads: tuple[int, ...] = ()
    gated: int = 0
    fixed_width: bool = False


def chosen(
    modules: Sequence[str] | None = None, names: Sequence[str] | None = None
) -> list[tuple[str, str]]:
    """The (module, name) pairs to sweep over, in timm's order.

    Args:
        modules: timm modules; ``None``: :data:`MODULES`.
        names: only names that match one of these patterns, such as ``deit_*``; ``None``: all.

    Raises:
        ValueError: if timm has no such module, or no name matches a pattern.

    >>> chosen(["deit"], ["deit_t*"])
    [('deit', 'deit_tiny_distilled_patch16_224'), ('deit', 'deit_tiny_patch16_224')]
    """
    pairs = list(_pairs(MODULES if modules is None else modules))
    if names is None:
        return pairs
    for pattern in names:
        if not any(fnmatch.fnmatchcase(name, pattern) for _, name in pairs):
            raise SettingError(
                f"no name matches {pattern!r} in timm's modules {', '.join(modules or MODULES)}"
            )
    return [
        pair for pair in pairs if any(fnmatch.fnmatchcase(pair[1], pattern) for pattern in names)
    ]


def _pairs(modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    for module in modules:
        found = timm.list_models(module=module)
        if not found:
            raise SettingError(
                f"timm {timm.__version__} registers no model in a module {module!r}; try"
                f" {', '.join(MODULES)}"
            )
        yield from ((module, name) for name in found)


def outlined(name: str) -> Any:
    """A timm model without memory: shapes only."""
    with torch.device("meta"):
        return timm.create_model(name)


def facts_of(vit: Any) -> Facts:
    """What a timm model is, whatever its class."""
    blocks = list(getattr(vit, "blocks", ()))
    first: Any = blocks[0] if blocks else nn.Module()
    attention = next(
        (
            module.attn
            for module in first.modules()
            if isinstance(getattr(module, "attn", None), nn.Module)
        ),
        None,
    )
    heads = next(
        (int(module.num_heads) for module in first.modules() if hasattr(module, "num_heads")), 0
    )
    groups = [getattr(getattr(block, "attn", None), "num_kv_groups", None) for block in blocks]
    gated: list[Any] = [module for module in first.modules() if isinstance(module, GluMlp)]
    return Facts(
        type(vit).__name__,
        type(first).__name__ if blocks else "",
        "" if attention is None else type(attention).__name__,
        len(blocks),
        int(getattr(vit, "embed_dim", 0) or 0),
        heads,
        _count(vit),
        tuple(heads // group for group in groups if group is not None),
        gated[0].fc1.out_features if gated else 0,
        isinstance(getattr(getattr(vit, "patch_embed", None), "proj", None), nn.Identity),
    )


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
