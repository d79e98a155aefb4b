"""DiffRate: prune and merge by numbers that were learned for each block."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from itertools import accumulate
from typing import Any

import yaml

from tdm_lightning.core.checks import check_number
from tdm_lightning.core.info import ModelInfo
from tdm_lightning.errors import SettingError
from tdm_lightning.importance import ClassAttention
from tdm_lightning.mergers import Merger, RankMerger
from tdm_lightning.schedules import CountPerBlock, Schedule, SearchSpace, SharePerBlock
from tdm_lightning.strategies.base import Strategy
from tdm_lightning.strategies.reduction import TokenReduction


class DiffRate(TokenReduction):
    """Drops the least attended tokens of a block and merges the next ones into the rest, by numbers
    that were learned for each block (Chen et al., "DiffRate: Differentiable Compression Rate for
    Efficient Vision Transformers", ICCV 2023; ``OpenGVLab/DiffRate``).

    Tokens are ranked by class attention in every block, see :class:`~tdm_lightning.RankMerger`.
    With published numbers it needs no training; ``tdm rates`` learns numbers for a model and data.

    Args:
        counts: patch tokens that each block leaves, one number for each; or the name of numbers
            that the authors published, such as ``"deit_small-2.9"``, the model and its GFLOPs.
            Those are shares of the patches, so that other image sizes can have them.
        pruned: patch tokens that each block leaves after dropping and before merging; ``None``:
            those of the published numbers, or nothing is dropped.
        power: published shares are raised to this power, which meets budgets between and beyond
            them; above 1 fewer tokens stay.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range, or numbers of
            that name were not published.
    """

    def __init__(
        self,
        counts: str | Sequence[int] = "deit_small-2.9",
        pruned: Sequence[int] | None = None,
        power: float = 1.0,
    ) -> None:
        self.power = check_number(power, "power", above=True)
        if isinstance(counts, str):
            if pruned is not None:
                raise SettingError(f"{counts!r} has its own pruned tokens; leave pruned out")
            patches, before, after = _published(counts)
            schedule: Schedule = SharePerBlock([count / patches for count in after], self.power)
            pruning: Schedule = SharePerBlock([count / patches for count in before], self.power)
        else:
            if self.power != 1:
                raise SettingError("power changes published numbers only; give other counts")
            schedule = CountPerBlock(counts)
            pruning = schedule if pruned is None else CountPerBlock(pruned)
            counts, pruned = list(counts), None if pruned is None else list(pruned)
            if pruned is not None and len(pruned) != len(counts):
                raise SettingError(
                    f"pruned must hold as many numbers as counts, {len(counts)}, got {len(pruned)}"
                )
        super().__init__(ClassAttention(), schedule, RankMerger())
        self.counts, self.pruned = counts, pruned
        self._drops, self._pruning = isinstance(counts, str) or pruned is not None, pruning

    def merger_in(self, index: int, info: ModelInfo) -> Merger:
        """One that drops as many as the block prunes."""
        if not self._drops:
            return self.reducer
        before = info.patches
        for block in range(index):
            before = self.schedule.keep(block, before, info)
        left = self.schedule.keep(index, before, info)
        return RankMerger(before - max(left, self._pruning.keep(index, before, info)))

    def search_space(self, depth: int, patches: int) -> SearchSpace[Strategy] | None:
        """Powers from 12 down to 0.012 of published numbers; none of given ones."""
        if not isinstance(self.counts, str):
            return None
        found = self.schedule.search_space(depth, patches)
        return found.map(lambda schedule: self.changed(power=schedule.power))


@cache
def _numbers() -> dict[str, dict[str, Any]]:
    text = files("tdm_lightning.strategies").joinpath("diffrate.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def _published(name: str) -> tuple[int, list[int], list[int]]:
    """Patches of the model, and those after pruning and after merging in each block; none greater
    than the one before, as tokens that are gone do not come back.
    """
    known = _numbers()
    if name not in known:
        raise SettingError(f"no numbers {name!r} were published; there are {', '.join(known)}")
    found = known[name]
    merged = list(accumulate(map(min, found["pruned"], found["merged"]), min))
    return found["patches"], list(accumulate(found["pruned"], min)), merged
