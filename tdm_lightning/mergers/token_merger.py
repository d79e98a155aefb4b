"""The token merger: what TDM does with the tokens it has told apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdm_lightning.core.checks import check_choice, check_count, check_fraction
from tdm_lightning.core.configurable import Configurable
from tdm_lightning.core.tokens import Reduction, Role
from tdm_lightning.errors import SettingError, SettingTypeError
from tdm_lightning.ops import (
    cluster_density_peaks,
    gather_tokens,
    group_weights,
    inverse_order,
    match_pairs,
    merge_groups,
    rank_order,
)


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


class TokenMerger(Configurable):
    """Clusters the inattentive tokens and fuses similar attentive ones, down to a given total (Long
    et al., CVPR 2023, §3.2).

    The paper says *what* happens (a simplified density-peak clustering, a matching of homogeneous
    pairs, a weighted combination); it has no public code. The defaults are readings; what the
    sources leave open is an argument. It has no parameters.

    Args:
        cluster_fraction: clusters per inattentive token, in (0, 1].
        density: kernel of the density peaks: ``"gaussian"``, ``"cutoff"`` or ``"knn"``, see
            :func:`~tdm_lightning.ops.cluster_density_peaks`.
        cutoff: quantile of the distances that the ``"cutoff"`` kernel takes as its radius, in (0,
            1].
        neighbours: k of the ``"knn"`` kernel.
        assignment: a token joins the ``"nearest"`` centre, or the cluster of its nearest
            ``"denser"`` token.
        cluster_weights: a cluster is the ``"attention"``-weighted mean of its tokens, their plain
            ``"mean"``, or the attention-weighted ``"sum"`` without normalisation, as EViT fuses
            (only sensible with fine-tuning).
        matching: ``"bipartite"``, ``"greedy"`` or ``"mutual"``, see
            :func:`~tdm_lightning.ops.match_pairs`.
        match_weights: a pair becomes its ``"attention"``-weighted or its plain ``"mean"``.
        attentive_ratio: share of the tokens that are attentive, in (0, 1]; ``None``: as many as
            leave.
        features: what is compared: the residual-stream ``"tokens"``, the same under the block's
            second norm (``"normed"``), or the head-averaged ``"keys"`` of its attention.
        proportional_attention: add log(size) of each token to the logits of its key in later blocks
            (ToMe), so that a merged token attracts as much attention as its patches did. The paper
            does not mention it; on by measurement: 5 and 7 points of accuracy at keep rates 0.5 and
            0.3 without fine-tuning, 2 and 1 after it (``.github/study/ablation.md``).

    Raises:
        TypeError, ValueError: if an argument is of the wrong kind or out of range.
    """

    def __init__(
        self,
        cluster_fraction: float = 0.25,
        density: Literal["gaussian", "cutoff", "knn"] = "gaussian",
        cutoff: float = 0.02,
        neighbours: int = 5,
        assignment: Literal["nearest", "denser"] = "nearest",
        cluster_weights: Literal["attention", "mean", "sum"] = "attention",
        matching: Literal["bipartite", "greedy", "mutual"] = "bipartite",
        match_weights: Literal["attention", "mean"] = "attention",
        attentive_ratio: float | None = None,
        features: Literal["tokens", "normed", "keys"] = "tokens",
        proportional_attention: bool = True,
    ) -> None:
        self.cluster_fraction = check_fraction(cluster_fraction, "cluster_fraction")
        self.density = check_choice(density, ("gaussian", "cutoff", "knn"), "density")
        self.cutoff = check_fraction(cutoff, "cutoff")
        self.neighbours = check_count(neighbours, "neighbours")
        self.assignment = check_choice(assignment, ("nearest", "denser"), "assignment")
        self.cluster_weights = check_choice(
            cluster_weights, ("attention", "mean", "sum"), "cluster_weights"
        )
        self.matching = check_choice(matching, ("bipartite", "greedy", "mutual"), "matching")
        self.match_weights = check_choice(match_weights, ("attention", "mean"), "match_weights")
        self.attentive_ratio = (
            None if attentive_ratio is None else check_fraction(attentive_ratio, "attentive_ratio")
        )
        self.features = check_choice(features, ("tokens", "normed", "keys"), "features")
        self.proportional_attention = bool(proportional_attention)

    def needs(self) -> frozenset[str]:
        """What the merger must see beside the tokens, in the words of :meth:`Strategy.needs`."""
        return frozenset() if self.features == "tokens" else frozenset({self.features})

    def split(self, n: int, keep: int) -> Split:
        """How ``n`` tokens become ``keep``; raises ``ValueError`` where that cannot be, see
        :func:`split_budget`.
        """
        return split_budget(n, keep, self.cluster_fraction, self.attentive_ratio)

    def __call__(
        self, x: Tensor, importance: Tensor, keep: int, features: Tensor | None = None
    ) -> Reduction:
        """Merge N tokens into ``keep``.

        Args:
            x: patch tokens, B×N×C.
            importance: non-negative score of each, B×N; gradients flow through it as combination
                weights.
            keep: how many tokens leave, ``1 ≤ keep < N``.
            features: what to compare instead of ``x``, B×N×D.

        Returns:
            The merged tokens, attentive ones first in the order of their importance, then the
            clusters.
        """
        n = x.shape[1]
        split = self.split(n, keep)
        singles = split.attentive - split.pairs
        order = rank_order(importance)
        x, importance = gather_tokens(x, order), importance.gather(1, order)
        compared = (x if features is None else gather_tokens(features, order)).detach()

        group, weight, role = [], [], []
        if split.attentive:
            pair, shared = match_pairs(compared[:, : split.attentive], split.pairs, self.matching)
            group.append(pair)
            weight.append(
                group_weights(importance[:, : split.attentive], pair, singles, self.match_weights)
            )
            role.append(torch.where(shared, int(Role.MATCHED), int(Role.KEPT)))
        if split.clusters:
            label, share = self._cluster(
                compared[:, split.attentive :], importance[:, split.attentive :], split.clusters
            )
            group.append(label + singles)
            weight.append(share)
            role.append(torch.full_like(label, int(Role.CLUSTERED)))
        groups = torch.cat(group, dim=1)
        merged = merge_groups(x, groups, torch.cat(weight, dim=1), keep)
        back = inverse_order(order)
        return Reduction(merged, groups.gather(1, back), torch.cat(role, dim=1).gather(1, back))

    def represent(self, x: Tensor, importance: Tensor) -> Reduction:
        """Only the clustering: ``ceil(cluster_fraction·N)`` tokens that stand for all N, which are
        not removed.

        Args:
            x: tokens, B×N×C, the most important first.
            importance: non-negative score of each, B×N; gradients flow through it as combination
                weights.
        """
        clusters = math.ceil(self.cluster_fraction * x.shape[1])
        label, weight = self._cluster(x.detach(), importance, clusters)
        return Reduction(
            merge_groups(x, label, weight, clusters),
            label,
            torch.full_like(label, int(Role.CLUSTERED)),
        )

    def _cluster(
        self, compared: Tensor, importance: Tensor, clusters: int
    ) -> tuple[Tensor, Tensor]:
        """The cluster of each token and its weight in it, both B×N."""
        label, _ = cluster_density_peaks(
            compared, clusters, self.density, self.assignment, self.cutoff, self.neighbours
        )
        if self.cluster_weights == "sum":
            return label, importance
        return label, group_weights(importance, label, clusters, self.cluster_weights)


def check_merger(merger: TokenMerger | None) -> TokenMerger | None:
    """A token merger or none.

    Raises:
        TypeError: if it is something else.
    """
    if merger is not None and not isinstance(merger, TokenMerger):
        raise SettingTypeError(
            f"merger must be a TokenMerger or None, got {merger!r} of type {type(merger).__name__}"
        )
    return merger


def check_early_merger(merger: TokenMerger | None) -> TokenMerger | None:
    """:func:`check_merger` for strategies that merge before a block, where nothing but the tokens
    can be compared yet.

    Raises:
        ValueError: if the merger compares something else.
    """
    merger = check_merger(merger)
    if merger is not None and merger.features != "tokens":
        raise SettingError(
            "this strategy merges before a block, so a merger with"
            f" features={merger.features!r} has nothing to compare; use features='tokens'"
        )
    return merger
