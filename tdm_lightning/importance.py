"""How much each token matters: the first part of a reduction."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from tdm_lightning.core.checks import check_count
from tdm_lightning.core.configurable import Configurable
from tdm_lightning.core.reduction import Seen
from tdm_lightning.ops.constants import constant


class Importance(Configurable, ABC):
    """A score of each token, by which a merger keeps and combines. Has no parameters and no state.

    Subclasses store every ``__init__`` argument under its own name.
    """

    def requires(self) -> frozenset[str]:
        """What it must see of a block's attention: of ``{"importance", "received", "keys",
        "normed"}``.
        """
        return frozenset()

    @abstractmethod
    def __call__(self, seen: Seen, index: int, training: bool) -> Tensor:
        """The scores.

        Args:
            seen: the tokens, and what :meth:`requires` asked for.
            index: the block, from 0.
            training: whether the model trains.

        Returns:
            Non-negative scores, B×N, float32.
        """


class ClassAttention(Importance):
    """The attention that a token gets from the class token, mean over heads (EViT, TDM).

    In models without a class token: the mean attention that it receives from all patches.
    """

    def requires(self) -> frozenset[str]:
        """The attention."""
        return frozenset({"importance"})

    def __call__(self, seen: Seen, index: int, training: bool) -> Tensor:
        """See :meth:`Importance.__call__`."""
        assert seen.importance is not None
        return seen.importance


class ReceivedAttention(Importance):
    """The mean attention that a token receives from all patches, over heads; with a class token
    too.
    """

    def requires(self) -> frozenset[str]:
        """The attention received."""
        return frozenset({"received"})

    def __call__(self, seen: Seen, index: int, training: bool) -> Tensor:
        """See :meth:`Importance.__call__`."""
        assert seen.importance is not None
        return seen.importance


class Chance(Importance):
    """Random scores: the control that every importance must beat.

    In training each image gets other scores each time, drawn by torch's global generator. At
    inference they depend only on ``seed``, the block and a token's position, so that a result can
    be repeated and no image depends on its batch.

    Args:
        seed: of the scores at inference, a non-negative integer.

    Raises:
        TypeError, ValueError: if the seed is something else.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_count(seed, "seed", least=0)

    def __call__(self, seen: Seen, index: int, training: bool) -> Tensor:
        """See :meth:`Importance.__call__`."""
        batch, n = seen.x.shape[:2]
        if training:
            return torch.rand(batch, n, device=seen.x.device)
        scores = constant(
            lambda: _hashed(n, self.seed, index, seen.x.device),
            seen.x,
            "chance",
            n,
            self.seed,
            index,
        )
        return scores.expand(batch, -1)


def _hashed(n: int, seed: int, index: int, device: torch.device) -> Tensor:
    """Numbers in [0, 1) for positions ``0…n-1``, N: an integer hash, because generators break graph
    capture.
    """
    salt = ((seed + 1) * 0x9E3779B1 + (index + 1) * 0x85EBCA6B) & 0xFFFFFFFF
    code = (torch.arange(n, device=device) * 0x01000193 & 0xFFFFFFFF) ^ salt
    for _ in range(2):
        code = ((code ^ (code >> 16)) * 0x045D9F3B) & 0xFFFFFFFF
    return (code ^ (code >> 16)).float() / 2**32
