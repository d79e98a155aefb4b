"""The diversity score of a token set, as a function and as a metric."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from tdm_lightning.core.checks import check_choice
from tdm_lightning.errors import SettingError

Norm = Literal["medoid", "column", "composite"]
_NORMS = ("medoid", "column", "composite")


def diversity_score(
    z: Tensor, norm: Norm = "medoid", normalize: bool = False, valid: Tensor | None = None
) -> Tensor:
    """How far a token set is from being one repeated token: ``min_j ‖Z - 1 z_jᵀ‖`` over its
    own rows.

    The paper (Long et al., CVPR 2023, after Dong et al., 2021) takes the ℓ1 norm and restricts
    ``z`` to rows of Z. It does not say which matrix norm that is; the entry-wise one is our
    reading, the others come from the literature on rank collapse.

    Args:
        z: tokens without prefix tokens, N×C or B×N×C.
        norm: ``"medoid"``: entry-wise, ``min_j Σ_i ‖z_i - z_j‖₁``; ``"column"``: induced
            1-norm, the largest column sum; ``"composite"``: ``√(‖·‖₁·‖·‖_∞)`` of
            the induced norms.
        normalize: divide by N·C, to compare sets of different sizes.
        valid: which rows are tokens, bool, N or B×N; the others only pad images that have fewer.
            ``None``: all.

    Returns:
        Scores, a scalar or B, float32; 0 for tokens that are all equal, and where none is valid.

    Raises:
        ValueError: if ``z`` is not a set of tokens, ``valid`` does not fit it, or ``norm`` is
            unknown.

    >>> diversity_score(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0]])).item()
    3.0
    """
    check_choice(norm, _NORMS, "norm")
    if z.ndim not in (2, 3) or 0 in z.shape:
        raise SettingError(
            f"tokens must have shape N×C or B×N×C with at least one token, got {tuple(z.shape)}"
        )
    if valid is not None and valid.shape != z.shape[:-1]:
        raise SettingError(
            f"valid must have shape {tuple(z.shape[:-1])}, one entry per token, got"
            f" {tuple(valid.shape)}"
        )
    batch = z.float() if z.ndim == 3 else z.float().unsqueeze(0)
    here = (
        torch.ones_like(batch[..., 0], dtype=torch.bool)
        if valid is None
        else valid.view(batch.shape[:2])
    )
    if norm == "medoid":
        scores = (torch.cdist(batch, batch, p=1) * here.unsqueeze(2)).sum(dim=1)
    else:
        scores = torch.stack(
            [_induced(batch, batch[:, j : j + 1], here, norm) for j in range(batch.shape[1])], dim=1
        )
    score = scores.masked_fill(~here, torch.inf).amin(dim=1).where(here.any(dim=1), 0)
    if normalize:
        score = score / (here.sum(dim=1).clamp(min=1) * batch.shape[2])
    return score if z.ndim == 3 else score[0]


def _induced(z: Tensor, row: Tensor, here: Tensor, norm: Norm) -> Tensor:
    residual = (z - row).abs() * here.unsqueeze(2)
    column = residual.sum(dim=1).amax(dim=1)
    return column if norm == "column" else (column * residual.sum(dim=2).amax(dim=1)).sqrt()


class DiversityScore(Metric):
    """Mean :func:`diversity_score` over images; sum states, so it adds up across batches and
    processes.

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

    def update(self, z: Tensor, valid: Tensor | None = None) -> None:
        """Add the images of a batch; tokens without prefix tokens, B×N×C (or N×C: one image),
        see :func:`diversity_score`.
        """
        score = diversity_score(z.detach(), self.norm, self.normalize, valid)
        self.total += score.sum()
        self.images += score.numel()

    def compute(self) -> Tensor:
        """Mean score per image, float32; NaN before the first image."""
        return (self.total / self.images).float()
