"""Attention weights under a differentiable mask."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_lightning.ops.precision import full_precision


def policy_softmax(logits: Tensor, policy: Tensor, eps: float = 1e-6) -> Tensor:
    """Softmax in which token j may be attended to as far as its policy allows (Rao et al.,
    DynamicViT, 2021, eq. 10).

    With ``m_ij = 1`` if ``i = j`` and the policy of j otherwise, and ``e = exp(S - max_j S)·m``,
    the weights are ``(e + ε/T) / (Σ_j e + ε)``: a token always sees itself. The mask multiplies:
    added to the logits as a logarithm its gradient would be undefined where the policy is 0.

    Args:
        logits: scaled products of queries and keys, B×H×T×T.
        policy: B×T, 1: everyone may attend to this token, 0: only itself.
        eps: keeps a token that sees nothing at equal weights.

    Returns:
        Weights, B×H×T×T, float32; with a policy of ones the softmax up to ``eps``.

    >>> weights = policy_softmax(torch.zeros(1, 1, 2, 2), torch.tensor([[1.0, 0.0]]))
    >>> weights.squeeze().round(decimals=3).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    length = logits.shape[-1]
    with full_precision(logits.device):
        logits = logits.float()
        itself = torch.eye(length, device=logits.device)
        allowed = policy.float()[:, None, None, :]
        allowed = allowed + (1 - allowed) * itself
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp() * allowed
        return (weights + eps / length) / (weights.sum(dim=-1, keepdim=True) + eps)
