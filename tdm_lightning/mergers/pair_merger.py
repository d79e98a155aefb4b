"""The most similar tokens are merged in pairs."""

from __future__ import annotations

from typing import Literal

from tdm_lightning.core.checks import check_choice
from tdm_lightning.core.reduction import Reduction, Seen
from tdm_lightning.mergers.pairing import HalvingMerger, means_of_patches
from tdm_lightning.ops import match_alternating


class PairMerger(HalvingMerger):
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

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`."""
        compared = seen.keys if self.features == "keys" else seen.x
        assert compared is not None
        # The set that a patch is in follows from its position in the sequence, prefix included.
        group = match_alternating(compared, seen.x.shape[1] - keep, seen.prefix)
        return means_of_patches(seen, group, keep)
