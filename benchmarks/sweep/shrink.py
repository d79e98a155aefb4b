"""Smaller models from the same entry points, for those that are too large to run."""

from __future__ import annotations

from typing import Any

from benchmarks.sweep.names import Facts

#: Blocks and heads of a shrunk model, at most.
BLOCKS, HEADS = 6, 4

Arguments = dict[str, Any]


def shrinking(facts: Facts) -> Arguments:
    """Arguments of ``timm.create_model`` that make a model small; none where it is already.

    The depth is cut, and the number of heads, and the width with it: a head keeps its channels, so
    that rotary tables and norms stay as they are. The image keeps its size.

    Args:
        facts: of the model as timm has it.

    >>> shrinking(Facts("VisionTransformer", "Block", "Attention", 24, 1024, 16, 304_000_000))
    {'depth': 6, 'embed_dim': 256, 'num_heads': 4}
    """
    if not facts.depth:
        return {}
    depth = min(facts.depth, BLOCKS)
    shrunk: Arguments = {"depth": depth} if depth < facts.depth else {}
    heads = _dividing(facts, min(facts.heads, HEADS))
    if heads < facts.heads and not facts.fixed_width:
        shrunk |= {"embed_dim": facts.width // facts.heads * heads, "num_heads": heads}
    if shrunk and facts.key_heads:  # blocks of each kind stay, in their order
        spread = [facts.key_heads[index * facts.depth // depth] for index in range(depth)]
        shrunk["num_kv_heads"] = tuple(
            max(1, keys * shrunk.get("num_heads", facts.heads) // facts.heads) for keys in spread
        )
    return shrunk


def _dividing(facts: Facts, most: int) -> int:
    """The largest number of heads up to ``most`` whose share of a gated MLP has halves."""
    return next(
        (heads for heads in range(most, 0, -1) if facts.gated * heads % (2 * facts.heads) == 0),
        most,
    )


def shrunk_text(facts: Facts, arguments: Arguments) -> str:
    """How much smaller, in words; empty for a model of full size.

    >>> facts = Facts("VisionTransformer", "Block", "Attention", 24, 1024, 16, 304_000_000)
    >>> shrunk_text(facts, {"depth": 6, "embed_dim": 256, "num_heads": 4})
    'depth 6 of 24, width 256 of 1024'
    """
    whole = {"depth": ("depth", facts.depth), "embed_dim": ("width", facts.width)}
    return ", ".join(
        f"{whole[key][0]} {value} of {whole[key][1]}"
        for key, value in arguments.items()
        if key in whole
    )
