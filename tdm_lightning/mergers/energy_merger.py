"""Tokens in large groups of like ones are merged, unusual ones are protected."""

from __future__ import annotations

from tdm_lightning.core.checks import check_number
from tdm_lightning.core.reduction import Reduction, Seen
from tdm_lightning.mergers.pairing import HalvingMerger, means_of_patches
from tdm_lightning.ops import match_by_energy


class EnergyMerger(HalvingMerger):
    """Ranks tokens by how many others they are like, and merges those of highest energy in pairs
    (PiToMe, Tran et al., "Accelerating Transformers with Spectrum-Preserving Token Merging",
    NeurIPS 2024).

    What is compared are the head-averaged keys; see :func:`~tdm_lightning.ops.match_by_energy`.
    Every group becomes the mean of its patches. It halves the tokens at most.

    Args:
        margin: the cosine from which two tokens count as alike.
        protect: only as many tokens as the merging needs take part, those of highest energy; the
            others are protected. Without it all take part, and the most similar pairs are merged.
        proportional_attention: see :class:`Merger`.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        margin: float = 0.5,
        protect: bool = True,
        proportional_attention: bool = False,
    ) -> None:
        self.margin = check_number(margin, "margin")
        self.protect = bool(protect)
        self.proportional_attention = bool(proportional_attention)

    def requires(self) -> frozenset[str]:
        """Keys."""
        return frozenset({"keys"})

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`; leaves tokens of high energy first."""
        assert seen.keys is not None
        n = seen.x.shape[1]
        among = 2 * (n - keep) if self.protect else n
        group = match_by_energy(seen.keys, n - keep, self.margin, among)
        return means_of_patches(seen, group, keep)
