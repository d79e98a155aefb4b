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

    Computed in float32 through one matrix product of the centred tokens: half precision would
    overflow in the squares, and centring keeps the cancellation of ``|a|² + |b|² - 2ab`` small.

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


def _log_density(distance: Tensor, kernel: Density, cutoff: float, neighbours: int) -> Tensor:
    """Logarithm of every token's local density, B×N, up to a constant; the kernels of
    :func:`cluster_density_peaks`.

    A logarithm, because densities of tokens that lie far apart would all underflow to zero.
    """
    n = distance.shape[1]
    if kernel == "knn":
        return (
            distance.topk(min(neighbours, n), dim=-1, largest=False).values.square().mean(-1).neg()
        )
    if kernel == "cutoff":
        rank = min(
            n * n, n + max(1, round(cutoff * n * (n - 1)))
        )  # the n smallest are the zero diagonal
        radius = distance.flatten(1).topk(rank, dim=1, largest=False).values[:, -1:].unsqueeze(-1)
        distance = distance / radius.clamp(min=1e-6)
    itself = torch.eye(n, dtype=torch.bool, device=distance.device)
    exponent = distance.square().neg().masked_fill(itself, -torch.inf)
    largest = exponent.amax(-1, keepdim=True).clamp(
        min=torch.finfo(exponent.dtype).min
    )  # a token alone has no neighbour
    # The mean and not the sum: near tokens have means close to 1, where the logarithm is most
    # precise.
    return largest.squeeze(-1) + (exponent - largest).exp().mean(-1).log()


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

    A token is a good centre when it lies in a dense region and far from every denser token: the
    score is ``ρ·δ`` with the local density ρ and the distance δ to the nearest denser token
    (for the densest: its largest distance). Tokens must come sorted by importance, because equal
    densities are told apart by position, the earlier counting as denser; so the result is
    deterministic and moves with a permutation of the patches.

    Args:
        x: tokens, B×N×C, the most important first.
        clusters: number of clusters K, ``1 ≤ K ≤ N``.
        density: ``"gaussian"``: ``Σ_{j≠i} exp(-d_ij²)``; ``"cutoff"``: ``Σ_{j≠i}
            exp(-(d_ij/d_c)²)`` with ``d_c`` the ``cutoff`` quantile of the distances; ``"knn"``:
            ``exp(-mean d²)`` over the nearest ``neighbours``, the token itself included (TCFormer,
            Zeng et al., 2022).
        assignment: ``"nearest"`` centre, or the label of the nearest ``"denser"`` token (the
            classic rule).
        cutoff: quantile in (0, 1) for the ``"cutoff"`` kernel.
        neighbours: k of the ``"knn"`` kernel, capped at N.

    Returns:
        The label of every token in ``0…K-1``, B×N, and the centres' positions, B×K, best score
        first; both int64.
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
    log_rho = _log_density(distance, density, cutoff, neighbours)
    position = torch.arange(n, device=distance.device)
    earlier = position.unsqueeze(0) < position.unsqueeze(1)  # [i, j]: j stands before i
    denser = (log_rho.unsqueeze(1) > log_rho.unsqueeze(2)) | (
        (log_rho.unsqueeze(1) == log_rho.unsqueeze(2)) & earlier
    )
    delta, parent = distance.masked_fill(~denser, torch.inf).min(dim=-1)
    peak = delta.isinf()  # only the densest token has no denser one
    # The densest token has the largest rho and takes its largest distance for delta, so its score
    # is the highest there is; infinity says so even where all tokens are equal.
    score = (log_rho + delta.log()).masked_fill(peak, torch.inf)
    centres = score.topk(clusters, dim=1).indices
    labels = torch.arange(clusters, device=distance.device).expand(batch, -1)
    if assignment == "nearest":
        index = centres.unsqueeze(1).expand(-1, n, -1)
        label = distance.gather(2, index).argmin(dim=-1)
        return label.scatter(1, centres, labels), centres
    # Follow the chain of denser tokens up to a centre; jumping to the parent's parent halves the
    # way each time.
    parent = parent.scatter(1, centres, centres)
    for _ in range(max(1, math.ceil(math.log2(n)))):
        parent = parent.gather(1, parent)
    return torch.zeros_like(parent).scatter(1, centres, labels).gather(1, parent), centres
