"""The token merger: what TDM does with the tokens it has told apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdm_lightning.core.checks import check_choice, check_count, check_fraction
from tdm_lightning.core.reduction import Reduction, Role, Seen
from tdm_lightning.errors import SettingError
from tdm_lightning.mergers.base import Merger
from tdm_lightning.ops import (
    cluster_density_peaks,
    combine,
    decouple,
    decoupled,
    share_group,
)

_WEIGHTS = ("attention", "size", "mean")


@dataclass(frozen=True)
class Split:
    """How N tokens become M: ``(attentive - pairs) + clusters = M``."""

    attentive: int
    clusters: int
    pairs: int


def split_budget(
    n: int, keep: int, cluster_fraction: float = 0.25, attentive_ratio: float | None = None
) -> Split:
    """Divide a budget of ``keep`` tokens between fused attentive tokens and clusters of inattentive
    ones.

    By default the ``keep`` most important tokens are attentive and as many pairs are fused as
    clusters are formed (the authors' drawing shows that, 10 tokens → 2 pairs + 1 single + 2
    groups; the paper's text gives no numbers, so this is a reading).

    Args:
        n: tokens that enter, N.
        keep: tokens that leave, M < N.
        cluster_fraction: clusters per inattentive token, rounded up and limited to what the budget
            allows.
        attentive_ratio: share of N that is attentive, rounded up; ``None``: exactly M tokens.

    Raises:
        ValueError: if no number of clusters fits; the message names the range.

    >>> split_budget(196, 138)
    Split(attentive=138, clusters=15, pairs=15)
    """
    if keep == 1:
        return Split(
            attentive=0, clusters=1, pairs=0
        )  # no pair can be made of one token: one cluster of everything
    attentive = keep if attentive_ratio is None else math.ceil(attentive_ratio * n)
    inattentive = n - attentive
    least = max(1 if inattentive else 0, keep - attentive)
    most = min(inattentive, keep - attentive + attentive // 2)
    if least > most:
        raise SettingError(
            f"no feasible split of {n} tokens into {keep} with attentive_ratio={attentive_ratio}:"
            f" {attentive} attentive tokens allow at most {attentive // 2} pairs, so between"
            f" {least} and {most} clusters would be needed; bring attentive_ratio nearer to the"
            f" keep rate, {keep / n:.2f}"
        )
    clusters = min(max(math.ceil(cluster_fraction * inattentive), least), most)
    return Split(attentive, clusters, pairs=attentive + clusters - keep)


class TokenMerger(Merger):
    """Clusters the inattentive tokens and fuses similar attentive ones, down to a given total
    (Long et al., CVPR 2023, §3.2).

    The paper says *what* happens (a simplified density-peak clustering, a matching of homogeneous
    pairs, a weighted combination); it has no public code. The defaults are readings; what the
    sources leave open is an argument.

    Args:
        cluster_fraction: clusters per inattentive token, in (0, 1].
        density: kernel of the density peaks: ``"gaussian"`` or ``"knn"``, see
            :func:`~tdm_lightning.ops.cluster_density_peaks`.
        neighbours: k of the ``"knn"`` kernel.
        cluster_weights: a cluster is the mean of its tokens weighted by ``"attention"``, by
            ``"size"``, that is the patches they stand for, or the plain ``"mean"``.
        matching: ``"bipartite"`` or ``"greedy"``, see :func:`~tdm_lightning.ops.match_pairs`.
        match_weights: the same of a pair.
        attentive_ratio: share of the tokens that is attentive, in (0, 1]; ``None``: as many as
            leave.
        features: what is compared: the residual-stream ``"tokens"``, the same under the block's
            second norm (``"normed"``), or the head-averaged ``"keys"`` of its attention.
        per_patch: tokens are ranked by their importance divided by the patches they stand for:
            with proportional attention merged tokens look attentive for their size alone.
        proportional_attention: see :class:`Merger`. The paper does not mention it; on by
            measurement: 5 and 7 points of accuracy at keep rates 0.5 and 0.3 without fine-tuning, 2
            and 1 after it (``benchmarks/results/study/ablation.md``).

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    retired = {"cutoff": 0.02, "assignment": "nearest"}  # noqa: RUF012 - never changed

    def __init__(
        self,
        cluster_fraction: float = 0.25,
        density: Literal["gaussian", "knn"] = "gaussian",
        neighbours: int = 5,
        cluster_weights: Literal["attention", "size", "mean"] = "attention",
        matching: Literal["bipartite", "greedy"] = "bipartite",
        match_weights: Literal["attention", "size", "mean"] = "attention",
        attentive_ratio: float | None = None,
        features: Literal["tokens", "normed", "keys"] = "tokens",
        per_patch: bool = False,
        proportional_attention: bool = True,
    ) -> None:
        self.cluster_fraction = check_fraction(cluster_fraction, "cluster_fraction")
        self.density = check_choice(density, ("gaussian", "knn"), "density")
        self.neighbours = check_count(neighbours, "neighbours")
        self.cluster_weights = check_choice(cluster_weights, _WEIGHTS, "cluster_weights")
        self.matching = check_choice(matching, ("bipartite", "greedy"), "matching")
        self.match_weights = check_choice(match_weights, _WEIGHTS, "match_weights")
        self.attentive_ratio = (
            None if attentive_ratio is None else check_fraction(attentive_ratio, "attentive_ratio")
        )
        self.features = check_choice(features, ("tokens", "normed", "keys"), "features")
        self.per_patch = bool(per_patch)
        self.proportional_attention = bool(proportional_attention)

    @property
    def reads_sizes(self) -> bool:  # type: ignore[override]
        """For proportional attention, as weights, and to rank by importance per patch."""
        weights = (self.cluster_weights, self.match_weights)
        return self.proportional_attention or self.per_patch or "size" in weights

    def requires(self) -> frozenset[str]:
        """Importance, and what it compares."""
        own = frozenset() if self.features == "tokens" else frozenset({self.features})
        return own | {"importance"}

    def split(self, n: int, keep: int) -> Split:
        """How ``n`` tokens become ``keep``.

        Raises:
            ValueError: where that cannot be, see :func:`split_budget`.
        """
        return split_budget(n, keep, self.cluster_fraction, self.attentive_ratio)

    def check(self, patches: int, keep: int) -> None:
        """See :meth:`Merger.check`: there must be a feasible :meth:`split`."""
        self.split(patches, keep)

    def __call__(self, seen: Seen, keep: int) -> Reduction:
        """Merge N tokens into ``keep``.

        Gradients flow through the importance as weights of the combinations.

        Returns:
            The merged tokens, attentive ones first in the order of their importance, then the
            clusters.
        """
        assert seen.importance is not None
        split = self.split(seen.x.shape[1], keep)
        singles = split.attentive - split.pairs  # their groups come first, then the clusters
        importance, size = seen.importance, _sizes(seen)
        group = self._groups(seen, importance / size if self.per_patch else importance, split)
        raw = _raw(self.match_weights, importance, size)
        if self.cluster_weights != self.match_weights:
            others = _raw(self.cluster_weights, importance, size)
            raw = torch.where(group < singles, raw, others)
        merged, total = combine(seen.x, group, raw, size, keep)

        def fate() -> tuple[Tensor, Tensor]:
            role = torch.where(share_group(group), int(Role.MATCHED), int(Role.KEPT))
            return group, role.masked_fill(group >= singles, int(Role.CLUSTERED))

        return Reduction.lazily(merged, fate, total)

    def _groups(self, seen: Seen, score: Tensor, split: Split) -> Tensor:
        """The group of each token, B×N."""
        compared = {"tokens": seen.x, "keys": seen.keys, "normed": seen.normed}[self.features]
        assert compared is not None
        plan = (compared.detach(), score.detach(), split.attentive, split.pairs, split.clusters)
        if (self.matching, self.density) == ("bipartite", "gaussian"):
            return decouple(*plan)
        return decoupled(*plan, self.matching, self.density, self.neighbours)

    def represent(self, seen: Seen) -> Reduction:
        """Only the clustering: ``ceil(cluster_fraction·N)`` tokens that stand for all N.

        Args:
            seen: the tokens, the most important first.
        """
        assert seen.importance is not None
        clusters = math.ceil(self.cluster_fraction * seen.x.shape[1])
        raw = _raw(self.cluster_weights, seen.importance, _sizes(seen))
        compared = seen.x.detach()
        label, _ = cluster_density_peaks(compared, clusters, self.density, self.neighbours)
        merged, _ = combine(seen.x, label, raw, raw, clusters)
        return Reduction(merged, label, torch.full_like(label, int(Role.CLUSTERED)))


def _sizes(seen: Seen) -> Tensor:
    """Patches that each token stands for, B×N."""
    assert seen.importance is not None
    return torch.ones_like(seen.importance) if seen.size is None else seen.size


def _raw(rule: str, importance: Tensor, size: Tensor) -> Tensor:
    """What tokens weigh in their groups, B×N, not normalised."""
    if rule == "mean":
        return torch.ones_like(size)
    return importance if rule == "attention" else size
