"""How much attention each token gets, computed beside the fused attention kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tdm_lightning.ops.precision import full_precision


@dataclass(frozen=True)
class QueryKey:
    """The query and key projections of one attention layer, as views of the model's own weights.

    Shapes: weights (H·d)×C, biases H·d. ``q_norm`` and ``k_norm`` act on the last dimension, d;
    ``rotate`` turns the queries and keys B×H×N×d of all patches by their positions; those of the
    first ``unrotated`` tokens stay.
    """

    q_weight: Tensor
    q_bias: Tensor | None
    k_weight: Tensor
    k_bias: Tensor | None
    heads: int
    scale: float
    q_norm: Callable[[Tensor], Tensor] | None = None
    k_norm: Callable[[Tensor], Tensor] | None = None
    rotate: Callable[[Tensor], Tensor] | None = None
    unrotated: int = 0

    def queries(self, x: Tensor) -> Tensor:
        """Scaled queries of tokens B×T×C, all of them or some of the first; B×H×T×d."""
        q = F.linear(x, self.q_weight, self.q_bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self._rotated(q if self.q_norm is None else self.q_norm(q)) * self.scale

    def keys(self, x: Tensor) -> Tensor:
        """Keys of tokens B×T×C, B×H×T×d."""
        return self._rotated(self.contents(x))

    def contents(self, x: Tensor) -> Tensor:
        """Keys of tokens B×T×C without their positions, B×H×T×d."""
        k = F.linear(x, self.k_weight, self.k_bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return k if self.k_norm is None else self.k_norm(k)

    def _rotated(self, x: Tensor) -> Tensor:
        first = self.unrotated
        if self.rotate is None or x.shape[2] <= first:
            return x
        return torch.cat((x[:, :, :first], self.rotate(x[:, :, first:])), dim=2)


def class_row(x: Tensor, qk: QueryKey, rows: int = 1, key_bias: Tensor | None = None) -> Tensor:
    """Attention that the first ``rows`` tokens pay to every token.

    Without a norm or rotation of the keys their projection is never formed: ``q·(W_k x) =
    (qᵀW_k)·x``, and the bias ``q·b_k`` is the same for every key, so the softmax cancels it.
    That costs ``rows·(2C² + H·T·C)`` multiply-accumulates instead of ``T·C²``.

    Args:
        x: the attention layer's input (normalised tokens), B×T×C.
        qk: its query and key projections.
        rows: number of leading tokens that ask: 1 for the class token, 2 with a distillation token.
        key_bias: added to the logits, broadcast to B×H×rows×T.

    Returns:
        Softmax weights, B×H×rows×T, float32.
    """
    q = qk.queries(x[:, :rows])
    k = None if qk.k_norm is None and qk.rotate is None else qk.keys(x)
    with full_precision(
        x.device
    ):  # logits may pass float16's largest number; the fused kernel keeps them in float32 too
        if k is None:
            weight = qk.k_weight.unflatten(0, (qk.heads, -1))
            asked = torch.einsum("bhrd,hdc->bhrc", q.float(), weight.float())
            logits = torch.einsum("bhrc,btc->bhrt", asked, x.float())
        else:
            logits = q.float() @ k.float().transpose(-2, -1)
    if key_bias is not None:
        logits = logits + key_bias
    return logits.softmax(dim=-1)


def received_attention(
    x: Tensor, qk: QueryKey, prefix: int = 0, key_bias: Tensor | None = None
) -> Tensor:
    """Mean attention that each patch receives from all patches, for models without a class token.

    Args:
        x: the attention layer's input (normalised tokens), B×T×C.
        qk: its query and key projections.
        prefix: leading tokens (registers) that neither ask nor are scored.
        key_bias: added to the logits, broadcast to B×H×(T-prefix)×T.

    Returns:
        Mean over heads and asking patches, B×(T-prefix), float32.
    """
    q, k = qk.queries(x)[:, :, prefix:], qk.keys(x)
    with full_precision(x.device):
        logits = q.float() @ k.float().transpose(-2, -1)
    if key_bias is not None:
        logits = logits + key_bias
    return logits.softmax(dim=-1)[..., prefix:].mean(dim=(1, 2))


def mean_keys(x: Tensor, qk: QueryKey) -> Tensor:
    """Keys averaged over the heads, B×T×d: the features that ToMe compares (Bolya et al., 2023);
    without their positions.

    Where the keys have no norm of their own the projection is averaged instead of the keys, which
    costs H times less.
    """
    if qk.k_norm is not None:
        return qk.contents(x).mean(dim=1)
    weight = qk.k_weight.unflatten(0, (qk.heads, -1)).mean(dim=0)
    bias = None if qk.k_bias is None else qk.k_bias.unflatten(0, (qk.heads, -1)).mean(dim=0)
    return F.linear(x, weight, bias)
