"""Density-peak clustering: groups the tokens that the class token hardly looks at."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tdm_lightning.ops.precision import full_precision

Density = Literal["gaussian", "cutoff", "knn"]
Assignment = Literal["nearest", "denser"]


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances between tokens, scaled by ``1/√C``.

    Computed in float32 through one matrix product of the centred tokens: half precision would overflow in the squares,
    and centring keeps the cancellation of ``|a|² + |b|² - 2ab`` small.

    Args:
        x: tokens, B×N×C.

    Returns:
        Distances, B×N×N, float32, with an exactly zero diagonal.
    """
    with full_precision(x.device):
        x = x.float()
        x = x - x.mean(dim=1, keepdim=True)
        norm = x.square().sum(-1)
        squared = norm.unsqueeze(2) + norm.unsqueeze(1) - 2 * (x @ x.transpose(1, 2))
    n = x.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=x.device)
    return squared.clamp(min=0).masked_fill(itself, 0).sqrt() / math.sqrt(x.shape[-1])


def _density(distance: Tensor, kernel: Density, cutoff: float, neighbours: int) -> Tensor:
    """Local density of every token, B×N; the three kernels of :func:`cluster_density_peaks`."""
    n = distance.shape[1]
    if kernel == "gaussian":
        return distance.square().neg().exp().sum(-1) - 1  # minus the token itself, at distance 0
    if kernel == "cutoff":
        rank = min(n * n, n + max(1, round(cutoff * n * (n - 1))))  # the n smallest are the zero diagonal
        radius = distance.flatten(1).topk(rank, dim=1, largest=False).values[:, -1:].unsqueeze(-1)
        return (distance / radius.clamp(min=1e-6)).square().neg().exp().sum(-1) - 1
    nearest = distance.topk(min(neighbours, n), dim=-1, largest=False).values
    return nearest.square().mean(-1).neg().exp()


@torch.no_grad()
def cluster_density_peaks(
    x: Tensor,
    clusters: int,
    density: Density = "gaussian",
    assignment: Assignment = "nearest",
    cutoff: float = 0.02,
    neighbours: int = 5,
) -> tuple[Tensor, Tensor]:
    """Partition tokens around density peaks (Rodriguez & Laio, 2014; Du et al., 2016).

    A token is a good centre when it lies in a dense region and far from every denser token: the score is ``ρ·δ`` with the
    local density ρ and the distance δ to the nearest denser token (for the densest: its largest distance). Tokens must come
    sorted by importance, because equal densities are told apart by position, the earlier counting as denser; so the
    result is deterministic and moves with a permutation of the patches.

    Args:
        x: tokens, B×N×C, the most important first.
        clusters: number of clusters K, ``1 ≤ K ≤ N``.
        density: ``"gaussian"``: ``Σ_{j≠i} exp(-d_ij²)``; ``"cutoff"``: ``Σ_{j≠i} exp(-(d_ij/d_c)²)`` with ``d_c`` the
            ``cutoff`` quantile of the distances; ``"knn"``: ``exp(-mean d²)`` over the nearest ``neighbours``, the token itself
            included (TCFormer, Zeng et al., 2022).
        assignment: ``"nearest"`` centre, or the label of the nearest ``"denser"`` token (the classic rule).
        cutoff: quantile in (0, 1) for the ``"cutoff"`` kernel.
        neighbours: k of the ``"knn"`` kernel, capped at N.

    Returns:
        The label of every token in ``0…K-1``, B×N, and the centres' positions, B×K, best score first; both int64.
    """
    distance = pairwise_distances(x)
    return peaks_from_distances(distance, clusters, density, assignment, cutoff, neighbours)


@torch.no_grad()
def peaks_from_distances(
    distance: Tensor,
    clusters: int,
    density: Density = "gaussian",
    assignment: Assignment = "nearest",
    cutoff: float = 0.02,
    neighbours: int = 5,
) -> tuple[Tensor, Tensor]:
    """:func:`cluster_density_peaks` for given distances, B×N×N."""
    batch, n, _ = distance.shape
    rho = _density(distance, density, cutoff, neighbours)
    position = torch.arange(n, device=distance.device)
    earlier = position.unsqueeze(0) < position.unsqueeze(1)  # [i, j]: j stands before i
    denser = (rho.unsqueeze(1) > rho.unsqueeze(2)) | ((rho.unsqueeze(1) == rho.unsqueeze(2)) & earlier)
    delta, parent = distance.masked_fill(~denser, torch.inf).min(dim=-1)
    peak = delta.isinf()  # only the densest token has no denser one
    # The densest token has the largest rho and takes its largest distance for delta, so its score is the highest there is;
    # infinity says so even where all tokens are equal and every score is zero.
    score = (rho * delta).masked_fill(peak, torch.inf)
    centres = score.topk(clusters, dim=1).indices
    labels = torch.arange(clusters, device=distance.device).expand(batch, -1)
    if assignment == "nearest":
        index = centres.unsqueeze(1).expand(-1, n, -1)
        label = distance.gather(2, index).argmin(dim=-1)
        return label.scatter(1, centres, labels), centres
    # Follow the chain of denser tokens up to a centre; jumping to the parent's parent halves the way each time.
    parent = parent.scatter(1, centres, centres)
    for _ in range(max(1, math.ceil(math.log2(n)))):
        parent = parent.gather(1, parent)
    return torch.zeros_like(parent).scatter(1, centres, labels).gather(1, parent), centres
