"""How much attention each token gets, read from queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from tdm_lightning.ops.constants import constant
from tdm_lightning.ops.precision import full_precision


def class_attention(
    q: Tensor, k: Tensor, scale: float, rows: int = 1, bias: Tensor | None = None
) -> Tensor:
    """Attention that the first ``rows`` tokens pay to every token.

    Args:
        q: queries, B×H×T×d.
        k: keys, B×H×T×d.
        scale: factor on their products.
        rows: number of leading tokens that ask: 1 for the class token, 2 with a distillation token.
        bias: added to the logits, broadcast to B×H×rows×T or B×H×T×T.

    Returns:
        Softmax weights, B×H×rows×T, float32.
    """
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[:, :, :rows]
    if rows > 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _weights(q[:, :, :rows], k, scale, bias)
    # One row: products token by token read the keys as they lie, where a matrix product would
    # first bring each head's together.
    width = k.shape[-1]
    with full_precision(q.device):
        ask = q[:, :, :1].transpose(1, 2).float()
        factor = constant(lambda: torch.full((width, 1), scale, device=q.device), q, width, scale)
        logits = ((k.transpose(1, 2) * ask) @ factor).permute(0, 2, 3, 1)  # B×T×H×1 → B×H×1×T
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1)


def received_attention(
    q: Tensor, k: Tensor, scale: float, prefix: int = 0, bias: Tensor | None = None
) -> Tensor:
    """Mean attention that each patch receives from all patches, for models without a class token.

    Args:
        q: queries, B×H×T×d.
        k: keys, B×H×T×d.
        scale: factor on their products.
        prefix: leading tokens (registers) that neither ask nor are scored.
        bias: added to the logits, broadcast to B×H×T×T.

    Returns:
        Mean over heads and asking patches, B×(T-prefix), float32.
    """
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[:, :, prefix:]
    return _weights(q[:, :, prefix:], k, scale, bias)[..., prefix:].mean(dim=(1, 2))


def _weights(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    # Logits may pass float16's largest number; the fused kernel keeps them in float32 too.
    with full_precision(q.device):
        logits = (q.float() * scale) @ k.float().transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1)
