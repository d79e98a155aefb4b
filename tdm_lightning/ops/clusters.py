"""Density-peak clustering: groups the tokens that the class token hardly looks at."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from tdm_lightning.ops.constants import constant, places
from tdm_lightning.ops.precision import full_precision

Density = Literal["gaussian", "knn"]


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances between tokens, scaled by ``1/√C``.

    Computed in float32 through one matrix product of the centred tokens: half precision would
    overflow in the squares, and centring keeps the cancellation of ``|a|² + |b|² - 2ab`` small.

    Args:
        x: tokens, B×N×C.

    Returns:
        Distances, B×N×N, float32, with an exactly zero diagonal.
    """
    return _squared_distances(x).sqrt() / math.sqrt(x.shape[-1])


def _squared_distances(x: Tensor) -> Tensor:
    """Those of :func:`pairwise_distances`, squared and not scaled."""
    with full_precision(x.device):
        x = x.float()
        x = x - x.mean(dim=1, keepdim=True)
        gram = x @ x.transpose(1, 2)
        # The diagonal; torch's own is a mask in ONNX, of a kind that TensorRT wants constant.
        norm = gram.flatten(1)[:, :: gram.shape[1] + 1]
        squared = torch.sub(norm.unsqueeze(2) + norm.unsqueeze(1), gram, alpha=2)
    return squared.clamp(min=0)


def _log_density(squared: Tensor, width: int, kernel: Density, neighbours: int) -> Tensor:
    """Logarithm of every token's local density, B×N, up to a constant; the kernels of
    :func:`cluster_density_peaks`, of squared distances between tokens of so many channels.

    A logarithm, because densities of tokens that lie far apart would all underflow to zero.
    """
    n = squared.shape[1]
    if kernel == "knn":
        nearest = squared.topk(min(neighbours, n), dim=-1, largest=False).values
        return nearest.mean(-1) / -width
    itself = constant(  # nobody is its own neighbour
        lambda: torch.full((n,), -torch.inf, device=squared.device).diag(),
        squared,
        "itself",
        n,
    )
    return torch.add(itself, squared, alpha=-1 / width).logsumexp(dim=-1)


@torch.no_grad()
def cluster_density_peaks(
    x: Tensor, clusters: int, density: Density = "gaussian", neighbours: int = 5
) -> tuple[Tensor, Tensor]:
    """Partition tokens around density peaks (Rodriguez & Laio, 2014; Du et al., 2016).

    A token is a good center when it lies in a dense region and far from every denser token: the
    score is ``ρ·δ`` with the local density ρ and the distance δ to the nearest denser token (for
    the densest: its largest distance). The others join their nearest center. Tokens must come
    sorted by importance, because equal densities are told apart by position, the earlier counting
    as denser; so the result is deterministic and moves with a permutation of the patches.

    Args:
        x: tokens, B×N×C, the most important first.
        clusters: number of clusters K, ``1 ≤ K ≤ N``.
        density: ``"gaussian"``: ``Σ_{j≠i} exp(-d_ij²)``; ``"knn"``: ``exp(-mean d²)`` over the
            nearest ``neighbours``, the token itself included (TCFormer, Zeng et al., 2022).
        neighbours: k of the ``"knn"`` kernel, capped at N.

    Returns:
        The label of every token in ``0…K-1``, B×N, and the centers' positions, B×K, best score
        first; both int64.
    """
    batch, n, width = x.shape
    squared = _squared_distances(x)  # all that follows goes by their order or their logarithm
    log_rho = _log_density(squared, width, density, neighbours)
    not_earlier = constant(  # [i, j]: j does not stand before i
        lambda: torch.ones(n, n, dtype=torch.bool, device=x.device).triu(),
        squared,
        "not earlier",
        n,
    )
    mine, other = log_rho.unsqueeze(2), log_rho.unsqueeze(1)
    sparser = (other < mine) | ((other == mine) & not_earlier)
    # Only the densest token has no denser one. It takes its largest distance for delta, so its
    # score is the highest there is; infinity says so even where all tokens are equal.
    delta = squared.masked_fill(sparser, torch.inf).amin(dim=-1)
    score = torch.add(log_rho, delta.log(), alpha=0.5)
    centers = score.topk(clusters, dim=1).indices
    index = centers.unsqueeze(1).expand(-1, n, -1)
    label = squared.gather(2, index).argmin(dim=-1)
    own = places(clusters, squared).expand(batch, -1)
    return label.scatter(1, centers, own), centers
