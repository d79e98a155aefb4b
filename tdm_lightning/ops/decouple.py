"""TDM's plan: attentive tokens are paired, the others clustered."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_lightning.ops.clusters import Density, cluster_density_peaks
from tdm_lightning.ops.constants import constant
from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tdm_lightning.ops.kernels.limits import too_many
from tdm_lightning.ops.merge import gather_tokens, rank_order
from tdm_lightning.ops.pairs import Matching, match_pairs
from tdm_lightning.ops.sums import add_at


@in_two_forms(
    "tdm_lightning.ops.kernels.decouple:decouple",
    lambda x, score, attentive, pairs, clusters: too_many(x.shape[1]),
)
def decouple(x: Tensor, score: Tensor, attentive: int, pairs: int, clusters: int) -> Tensor:
    """The groups of tokens under TDM's merger (Long et al., CVPR 2023, §3.2), in two forms.

    Args:
        x: what is compared, B×N×D.
        score: what ranks the tokens, the highest first, B×N.
        attentive: the first so many ranks are matched, :func:`~tdm_lightning.ops.match_pairs`.
        pairs: that are fused of them.
        clusters: of the others, :func:`~tdm_lightning.ops.cluster_density_peaks`.

    Returns:
        The group of every token in ``0…attentive-pairs+clusters-1``, B×N, int64: those of the
        attentive in the order of rank, then the clusters, the best center's first.
    """
    return decoupled(x, score, attentive, pairs, clusters)


@torch.no_grad()
def decoupled(
    x: Tensor,
    score: Tensor,
    attentive: int,
    pairs: int,
    clusters: int,
    matching: Matching = "bipartite",
    density: Density = "gaussian",
    neighbours: int = 5,
) -> Tensor:
    """:func:`decouple` with other rules, in torch's form; see the two functions named there."""
    order = rank_order(score)
    ranked = gather_tokens(x.detach(), order)
    singles = attentive - pairs
    group = constant(lambda: torch.full((1, 1), singles, device=x.device), x, "full", singles)
    group = group.expand(order.shape)
    if clusters:
        label, _ = cluster_density_peaks(ranked[:, attentive:], clusters, density, neighbours)
        group = add_at(group, order[:, attentive:], label)
    if attentive:
        matched = match_pairs(ranked[:, :attentive], pairs, matching)
        group = group.scatter(1, order[:, :attentive], matched)
    return group
