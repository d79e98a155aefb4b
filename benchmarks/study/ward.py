"""WardTDM with one of its parts changed at a time: schedule, linkage, rounds, features, weights; at
TDM's budgets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from benchmarks.study.plan import METHODS, Method
from tdm_lightning.core.reduction import Reduction, Seen
from tdm_lightning.flops import macs_with
from tdm_lightning.importance import ClassAttention
from tdm_lightning.mergers import WardMerger
from tdm_lightning.mergers.pairing import means_of_patches
from tdm_lightning.rates import learn_counts
from tdm_lightning.schedules import FewerPerBlock, RateAtBlocks, Schedule
from tdm_lightning.slimming.images import take_images
from tdm_lightning.strategies import Strategy, TokenReduction, WardTDM

RATES = (0.5, 0.3, 0.2)
_BLOCKS = (0, 3, 6, 9)
#: Training images that rates are learned on.
_LOOKED_AT = 256


class TokensAlone(WardMerger):
    """Compares the tokens, not the keys."""

    def prefers(self) -> frozenset[str]:
        """Nothing."""
        return frozenset()


class KeysAlone(WardMerger):
    """Compares the keys, not the tokens."""

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`WardMerger.__call__`."""
        assert seen.keys is not None
        found = super().__call__(replace(seen, x=seen.keys, keys=None), keep)
        return means_of_patches(seen, found.assignment, keep)


class NoSizes(WardMerger):
    """Every token weighs one in the linkage; groups are still means of their patches."""

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`WardMerger.__call__`."""
        assert seen.size is not None
        found = super().__call__(replace(seen, size=torch.ones_like(seen.size)), keep)
        return means_of_patches(seen, found.assignment, keep)


class Attentive(WardMerger):
    """Weighs tokens by size times a power of their importance per patch; none is protected."""

    def __init__(self, rounds: int | None = 4, power: float = 0.5) -> None:
        super().__init__(rounds, protect=0.0)
        self.power = power

    def requires(self) -> frozenset[str]:
        """Importance."""
        return frozenset({"importance"})

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`WardMerger.__call__`."""
        assert seen.size is not None
        assert seen.importance is not None
        per_patch = seen.importance / seen.size
        relative = per_patch / per_patch.mean(dim=1, keepdim=True)
        weight = seen.size * relative.clamp(min=1e-6) ** self.power
        found = super().__call__(replace(seen, size=weight), keep)
        return replace(found, size=found.totals(seen.size))


def _with(merger: WardMerger, schedule: Schedule | None = None) -> Strategy:
    importance = ClassAttention() if "importance" in merger.requires() else None
    return TokenReduction(importance, schedule or RateAtBlocks(0.7, _BLOCKS), merger)


def _fixed(name: str, *settings: object) -> Method:
    """A variant by name; its rate is solved for the budget."""
    return Method(name, lambda rate: WardTDM(0.7, *settings))  # type: ignore[arg-type]


def _learnt(name: str, layers: Sequence[int] | None, rounds: int) -> Method:
    """Rates learned for what the default costs."""

    def look(strategy: Strategy, vit: nn.Module, images: Iterable[Any]) -> Strategy:
        budget = macs_with(vit, strategy, total=True) / 1e9
        batches = take_images(images, _LOOKED_AT, next(vit.parameters()))
        own = TokenReduction(None, None, WardMerger(rounds))
        return learn_counts(vit, own, batches, budget, layers).strategy

    return Method(
        name,
        lambda rate: WardTDM(),
        note=f"on {_LOOKED_AT} training images; the setting is that of the default, whose cost is"
        " the budget",
        look=look,
    )


#: The line that all others are compared with.
DEFAULT = "WardTDM"
VARIANTS = (
    *(method for method in METHODS if method.name in (DEFAULT, "TDM", "ToMe", "ToMe (rate)")),
    _fixed("blocks 1 3 6 9", (1, 3, 6, 9)),
    _fixed("blocks 1 3 6 9, a tenth protected", (1, 3, 6, 9), 4, 0.1),
    _fixed("blocks 0 2 4 7", (0, 2, 4, 7)),
    _fixed("blocks 0 2 5 8", (0, 2, 5, 8)),
    _fixed("blocks 1 3 5 7", (1, 3, 5, 7)),
    _fixed("blocks 1 4 7", (1, 4, 7)),
    _fixed("blocks 3 6 9", (3, 6, 9)),
    _fixed("6 blocks", (0, 2, 4, 6, 8, 10)),
    _fixed("12 blocks, 2 rounds", "all", 2),
    _fixed("12 blocks, 1 round", "all", 1),
    Method("12 blocks, r fewer, 1 round", lambda rate: _with(WardMerger(1), FewerPerBlock(13))),
    _fixed("2 rounds", _BLOCKS, 2),
    _fixed("8 rounds", _BLOCKS, 8),
    _fixed("exact agglomeration", _BLOCKS, None),
    _learnt("rates learned", _BLOCKS, 4),
    _learnt("rates learned, 12 blocks, 2 rounds", None, 2),
    Method("tokens alone", lambda rate: _with(TokensAlone())),
    Method("keys alone", lambda rate: _with(KeysAlone())),
    Method("no sizes in the linkage", lambda rate: _with(NoSizes())),
    Method("no proportional attention", lambda rate: _with(WardMerger(4, 0.0, False))),
    _fixed("a twentieth protected", _BLOCKS, 4, 0.05),
    _fixed("a tenth protected", _BLOCKS, 4, 0.1),
    _fixed("a quarter protected", _BLOCKS, 4, 0.25),
    _fixed("two fifths protected", _BLOCKS, 4, 0.4),
    Method("weights with attention^0.25", lambda rate: _with(Attentive(power=0.25))),
    Method("weights with attention^0.5", lambda rate: _with(Attentive(power=0.5))),
    Method("weights with attention", lambda rate: _with(Attentive(power=1.0))),
)
