"""All tokens fall into clusters."""

from __future__ import annotations

from typing import Literal

import torch

from tdm_lightning.core.checks import check_choice, check_count
from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.mergers.base import Merger
from tdm_lightning.ops import cluster_density_peaks, combine


class Cluster(Merger):
    """Clusters all tokens around density peaks (TCFormer, Zeng et al., CVPR 2022).

    Each cluster becomes the weighted mean of its members; clusters are ordered by the score of
    their centers. Of equally dense tokens the earlier one counts as denser.

    Args:
        density: kernel of the density peaks, see :func:`~tdm_lightning.ops.cluster_density_peaks`.
        neighbours: k of the ``"knn"`` kernel, the token itself included.
        weights: members weigh alike (``"mean"``) or by their ``"importance"``.

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    reads_sizes = False

    def __init__(
        self,
        density: Literal["gaussian", "knn"] = "knn",
        neighbours: int = 5,
        weights: Literal["mean", "importance"] = "mean",
    ) -> None:
        self.density = check_choice(density, ("gaussian", "knn"), "density")
        self.neighbours = check_count(neighbours, "neighbours")
        self.weights = check_choice(weights, ("mean", "importance"), "weights")

    def requires(self) -> frozenset[str]:
        """Importance, where members weigh by it."""
        return frozenset({"importance"} if self.weights == "importance" else ())

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """See :meth:`Merger.__call__`."""
        label, _ = cluster_density_peaks(seen.x.detach(), keep, self.density, self.neighbours)
        raw = seen.importance
        if self.weights == "mean":
            raw = torch.ones_like(label, dtype=torch.float32)
        assert raw is not None
        merged, _ = combine(seen.x, label, raw, raw, keep)
        return Reduction.lazily(
            merged, lambda: (label, torch.full_like(label, int(Role.CLUSTERED)))
        )
