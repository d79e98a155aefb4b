"""Smaller models from the same entry points, for those that are too large to run."""

from __future__ import annotations

import math
from typing import Any

from tdm_lightning.sweep.names import Facts

#: Blocks of a shrunk model, and the heads of one that is shrunk all over.
BLOCKS, HEADS = 6, 4

Arguments = dict[str, Any]


def shrinking(facts: Facts, max_params: float, small: bool = False) -> Arguments:
    """Arguments of ``timm.create_model`` that make a model small enough; none where it is already.

    First the depth is cut, then the number of heads, and the width with it: a head keeps its channels, so that rotary tables
    and norms stay as they are. The image keeps its size.

    Args:
        facts: of the model as timm has it.
        max_params: the most it may have, as far as cutting the blocks can get it there.
        small: shrink it all over, however small it is.

    >>> facts = Facts("VisionTransformer", "Block", "Attention", 24, 1024, 16, 304_000_000, 302_000_000)
    >>> shrinking(facts, 3e8), shrinking(facts, 5e7), shrinking(facts, 4e8), shrinking(facts, 3e8, small=True)
    ({'depth': 6}, {'depth': 6, 'embed_dim': 512, 'num_heads': 8}, {}, {'depth': 6, 'embed_dim': 256, 'num_heads': 4})
    """
    if not facts.depth or not (small or facts.parameters > max_params):
        return {}
    depth = min(facts.depth, BLOCKS)
    shrunk: Arguments = {"depth": depth} if depth < facts.depth else {}
    heads = _dividing(facts, min(facts.heads, HEADS) if small else _affordable_heads(facts, depth, max_params))
    if heads < facts.heads and not facts.fixed_width:
        shrunk |= {"embed_dim": facts.width // facts.heads * heads, "num_heads": heads}
    if shrunk and facts.key_heads:  # blocks of each kind stay, in their order
        spread = [facts.key_heads[index * facts.depth // depth] for index in range(depth)]
        shrunk["num_kv_heads"] = tuple(max(1, keys * shrunk.get("num_heads", facts.heads) // facts.heads) for keys in spread)
    return shrunk


def _affordable_heads(facts: Facts, depth: int, max_params: float) -> int:
    """The most heads within the budget; a block's parameters grow with the square of their number."""
    blocks = facts.block_parameters * depth / facts.depth
    if facts.parameters - facts.block_parameters + blocks <= max_params:
        return facts.heads
    most = int(facts.heads * math.sqrt(max_params / (2 * blocks)))  # half for all that is not blocks
    return max(1, most // 4 * 4 or most)  # multiples of four suit a pooling head with another number of heads


def _dividing(facts: Facts, most: int) -> int:
    """The largest number of heads up to ``most`` whose share of a gated MLP has halves."""
    return next((heads for heads in range(most, 0, -1) if facts.gated * heads % (2 * facts.heads) == 0), most)


def shrunk_text(facts: Facts, arguments: Arguments) -> str:
    """How much smaller, in words; empty for a model of full size.

    >>> facts = Facts("VisionTransformer", "Block", "Attention", 24, 1024, 16, 304_000_000, 302_000_000)
    >>> shrunk_text(facts, {"depth": 6, "embed_dim": 256, "num_heads": 4})
    'depth 6 of 24, width 256 of 1024'
    """
    whole = {"depth": ("depth", facts.depth), "embed_dim": ("width", facts.width)}
    return ", ".join(f"{whole[key][0]} {value} of {whole[key][1]}" for key, value in arguments.items() if key in whole)
