"""What became of every patch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class LayerTrace:
    """What one reducing layer did with every original patch.

    Attributes:
        index: the block, counted from 0.
        importance: B×N_in, the scores it decided by; ``None`` where the method has none.
        assignment: B×N0, int64: the non-prefix output token, in output order, that now holds each
            patch; -1: dropped. Parked tokens are numbered behind those that stay in the blocks.
        role: B×N0, int64, :class:`~tdm_lightning.core.reduction.Role` of each patch.
    """

    index: int
    importance: Tensor | None
    assignment: Tensor
    role: Tensor


@dataclass(frozen=True)
class History:
    """What is noted on the way; only while tracing.

    Attributes:
        source: the patch token that holds each original patch, -1 where it was dropped, B×N0,
            int64, for every image of the full batch; see
            :meth:`tdm_lightning.strategies.base.Strategy.all_patches` for the numbering.
        layers: what the reducing layers did so far.
    """

    source: Tensor
    layers: tuple[LayerTrace, ...] = ()


@dataclass(frozen=True)
class Trace:
    """What became of every patch.

    Attributes:
        token_counts: patch tokens after each block; where some are parked, those that the block
            updated. For adaptive strategies each entry is a tensor B, one number per image, padding
            not counted.
        layers: one :class:`LayerTrace` per reducing block.
    """

    token_counts: list[Any]
    layers: list[LayerTrace]
