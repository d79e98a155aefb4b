"""The diversity score of a token set, as a function and as a metric."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from tdm_lightning.checks import check_choice

Norm = Literal["medoid", "column", "composite"]
_NORMS = ("medoid", "column", "composite")


def diversity_score(z: Tensor, norm: Norm = "medoid", normalize: bool = False) -> Tensor:
    """How far a token set is from being one repeated token: ``min_j ‖Z - 1 z_jᵀ‖`` over its own rows.

    The paper (Long et al., CVPR 2023, after Dong et al., 2021) takes the ℓ1 norm and restricts ``z`` to rows of Z. It does not
    say which matrix norm that is; the entry-wise one is our reading, the others come from the literature on rank collapse.

    Args:
        z: tokens without prefix tokens, N×C or B×N×C.
        norm: ``"medoid"``: entry-wise, ``min_j Σ_i ‖z_i - z_j‖₁``; ``"column"``: induced 1-norm, the largest column sum;
            ``"composite"``: ``√(‖·‖₁·‖·‖_∞)`` of the induced norms.
        normalize: divide by N·C, to compare sets of different sizes.

    Returns:
        Scores, a scalar or B, float32; 0 for tokens that are all equal.

    Raises:
        ValueError: if ``z`` is not a set of tokens or ``norm`` is unknown.

    >>> diversity_score(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])).item()
    3.0
    """
    check_choice(norm, _NORMS, "norm")
    if z.ndim not in (2, 3) or 0 in z.shape:
        raise ValueError(f"tokens must have shape N×C or B×N×C with at least one token, got {tuple(z.shape)}")
    batch = z.float() if z.ndim == 3 else z.float().unsqueeze(0)
    if norm == "medoid":
        score = torch.cdist(batch, batch, p=1).sum(dim=1).amin(dim=1)
    else:
        score = torch.stack([_induced(batch, batch[:, j : j + 1], norm) for j in range(batch.shape[1])], dim=1).amin(dim=1)
    if normalize:
        score = score / (batch.shape[1] * batch.shape[2])
    return score if z.ndim == 3 else score[0]


def _induced(z: Tensor, row: Tensor, norm: Norm) -> Tensor:
    residual = (z - row).abs()
    column = residual.sum(dim=1).amax(dim=1)
    return column if norm == "column" else (column * residual.sum(dim=2).amax(dim=1)).sqrt()


class DiversityScore(Metric):
    """Mean :func:`diversity_score` over images; sum states, so it adds up across batches and processes.

    Args:
        norm: as in :func:`diversity_score`.
        normalize: divide by N·C.
        kwargs: passed to :class:`torchmetrics.Metric`.

    >>> metric = DiversityScore()
    >>> metric.update(torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]]]))
    >>> metric.compute().item()
    3.0
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    total: Tensor
    images: Tensor

    def __init__(self, norm: Norm = "medoid", normalize: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = check_choice(norm, _NORMS, "norm")
        self.normalize = normalize
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, z: Tensor) -> None:
        """Add the images of a batch; tokens without prefix tokens, B×N×C (or N×C: one image)."""
        score = diversity_score(z.detach(), self.norm, self.normalize)
        self.total += score.sum()
        self.images += score.numel()

    def compute(self) -> Tensor:
        """Mean score per image, float32; NaN before the first image."""
        return (self.total / self.images).float()
