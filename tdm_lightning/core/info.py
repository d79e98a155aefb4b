"""What a strategy may know of the model around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class ModelInfo:
    """A Vision Transformer in numbers, whichever library it comes from.

    Attributes:
        depth: number of blocks.
        patches: number of patch tokens N0 that enter the first block; where it goes along with
            tokens, that of their images, otherwise at the image size that the model was made for.
        width: width C of the tokens.
        heads: attention heads of the first block.
        prefix: number of leading tokens that are no patches: class, distillation, registers.
        class_tokens: how many of them, from the first, stand for the class; their attention
            measures importance. 0: none.
        pooling: what the head reads: ``"token"``, the class token (or tokens), or ``"patches"``.
        relative_positions: whether blocks ask where a token is (RoPE, relative position bias).
        random_patches: whether the model drops patches at random in front of its blocks.
        num_classes: outputs of the classifier; 0 without one.
        device: where its parameters lie.
    """

    depth: int
    patches: int
    width: int
    heads: int
    prefix: int
    class_tokens: int
    pooling: Literal["token", "patches"]
    relative_positions: bool = False
    random_patches: bool = False
    num_classes: int = 0
    device: torch.device | None = None

    @property
    def readout(self) -> int | None:
        """Number of leading tokens that the head reads; ``None`` where it pools over patches."""
        return self.class_tokens or None if self.pooling == "token" else None
