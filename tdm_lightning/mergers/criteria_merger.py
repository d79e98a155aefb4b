"""Tokens that are alike, little attended and small are merged first."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tdm_lightning.core.checks import check_number
from tdm_lightning.core.reduction import Reduction, Seen
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.mergers.pairing import HalvingMerger, grouped
from tdm_lightning.ops import group_totals, match_both_ways, merge_groups

_TINY = 1e-12


class CriteriaMerger(HalvingMerger):
    """Weighs likeness, importance and size together (MCTF, Lee et al., "Multi-criteria Token Fusion
    with One-step-ahead Attention", CVPR 2024; ``mlvlab/MCTF``).

    See :func:`~tdm_lightning.ops.match_both_ways`. A group becomes the mean of its tokens, weighted
    by importance times size (eq. 10). It halves the tokens at most.

    Args:
        temperatures: of likeness, importance and size, positive.
        proportional_attention: see :class:`Merger`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        temperatures: tuple[float, float, float] = (1.0, 20.0, 40.0),
        proportional_attention: bool = True,
    ) -> None:
        if not isinstance(temperatures, Sequence) or isinstance(temperatures, str):
            raise SettingTypeError(
                f"temperatures must be three numbers such as (1, 20, 40), got {temperatures!r}"
            )
        if len(temperatures) != 3:
            raise SettingError(
                f"temperatures are of likeness, importance and size, got {list(temperatures)}"
            )
        one, two, three = (check_number(t, "a temperature", above=True) for t in temperatures)
        self.temperatures = (one, two, three)
        self.proportional_attention = bool(proportional_attention)

    def requires(self) -> frozenset[str]:
        """Importance."""
        return frozenset({"importance"})

    def shares(self, seen: Seen, group: Tensor, groups: int) -> Tensor:
        """How much of its group each token is, B×N."""
        assert seen.size is not None
        assert seen.importance is not None
        weight = seen.importance.float() * seen.size + _TINY
        return weight / group_totals(weight, group, groups).gather(1, group)

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`."""
        assert seen.size is not None
        assert seen.importance is not None
        pairs = seen.x.shape[1] - keep
        importance = seen.importance.float() + _TINY
        group = match_both_ways(
            seen.x, importance, seen.size, pairs, seen.prefix, self.temperatures
        )
        merged = merge_groups(seen.x, group, self.shares(seen, group, keep), keep)
        return grouped(merged, group, group_totals(seen.size, group, keep))
