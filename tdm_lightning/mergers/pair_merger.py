"""The most similar tokens are merged in pairs."""

from __future__ import annotations

from typing import Literal

import torch

from tdm_lightning.core.checks import check_choice
from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.errors import SettingError
from tdm_lightning.mergers.base import Merger
from tdm_lightning.ops import match_alternating, merge_groups


class PairMerger(Merger):
    """Matches all tokens in two sets and merges the most similar pairs (ToMe, Bolya et al., ICLR
    2023).

    Patches at even positions of the sequence propose to their most similar patch at an odd one; the
    best proposals are accepted and merged as means weighted by the number of patches they stand
    for. The split by position makes it the one merger here that does not commute with a
    permutation of the patches. It halves the tokens at most.

    Args:
        features: what is compared, by cosine: the head-averaged ``"keys"`` of the attention, or the
            ``"tokens"`` themselves.
        proportional_attention: see :class:`Merger`.

    Raises:
        ValueError: if ``features`` is something else.
    """

    def __init__(
        self,
        features: Literal["keys", "tokens"] = "keys",
        proportional_attention: bool = True,
    ) -> None:
        self.features = check_choice(features, ("keys", "tokens"), "features")
        self.proportional_attention = bool(proportional_attention)

    def requires(self) -> frozenset[str]:
        """Keys, unless it compares the tokens."""
        return frozenset({"keys"} if self.features == "keys" else ())

    def check(self, patches: int, keep: int) -> None:
        """See :meth:`Merger.check`.

        Raises:
            ValueError: if more than half would have to go.
        """
        check_half(patches, keep)

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`."""
        assert seen.size is not None
        compared = seen.keys if self.features == "keys" else seen.x
        assert compared is not None
        # The set that a patch is in follows from its position in the sequence, prefix included.
        group, shared = match_alternating(compared, seen.x.shape[1] - keep, seen.prefix)
        total = seen.size.new_zeros(seen.size.shape[0], keep).scatter_add(1, group, seen.size)
        merged = merge_groups(seen.x, group, seen.size / total.gather(1, group), keep)
        role = torch.where(shared, int(Role.MATCHED), int(Role.KEPT))
        return Reduction(merged, group, role, total)


def check_half(patches: int, keep: int) -> None:
    """Refuse what matching in two sets cannot do.

    Raises:
        ValueError: if more than half would have to go.
    """
    if patches - keep > patches // 2:
        raise SettingError(
            f"matching in two sets leaves at least {patches - patches // 2} of {patches} tokens in"
            f" one block, and {keep} are asked for; raise the keep rate or reduce in more blocks"
        )
