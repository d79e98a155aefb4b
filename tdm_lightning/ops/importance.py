"""How much attention each token gets, read from queries and keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdm_lightning.ops.constants import constant
from tdm_lightning.ops.kernels.dispatch import in_two_forms
from tdm_lightning.ops.precision import full_precision

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


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


def _refuses(q: Tensor, k: Tensor, scale: float, rows: int, bias: Tensor | None) -> str | None:
    if q.dtype not in _FLOATS or k.dtype != q.dtype:
        return (
            "the kernel takes queries and keys of one type, float32, float16 or bfloat16, got"
            f" {q.dtype} and {k.dtype}"
        )
    if not q.numel():
        return "there are no tokens"
    if bias is not None and bias.shape != (len(k), 1, 1, k.shape[2]):
        return (
            f"the kernel takes a bias for every key, {len(k)}×1×1×{k.shape[2]}, got"
            f" {tuple(bias.shape)}"
        )
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, ctx.scale, ctx.rows, bias = inputs
    ctx.save_for_backward(q, k, bias)


def _flow_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, bias = ctx.saved_tensors
    with full_precision(q.device):
        ask, keys = q[:, :, : ctx.rows].float(), k.float()
        weights = _weights(ask, keys, ctx.scale, bias)
        flow = weights * (grad / weights.shape[1:3].numel())[:, None, None]
        flow = flow - weights * flow.sum(dim=-1, keepdim=True)  # to the logits
        to_ask = (flow @ keys * ctx.scale).to(q.dtype)
        to_k = (flow.transpose(-2, -1) @ ask * ctx.scale).to(k.dtype)
    to_q = torch.cat((to_ask, torch.zeros_like(q[:, :, ctx.rows :])), dim=2)
    to_bias = None
    if bias is not None and ctx.needs_input_grad[4]:
        to_bias = flow.sum(dim=(1, 2), keepdim=True).to(bias.dtype)
    return to_q, to_k, None, None, to_bias


@in_two_forms(
    "tdm_lightning.ops.kernels.importance:class_importance",
    _refuses,
    setup_context=_save,
    backward=_flow_back,
)
def class_importance(q: Tensor, k: Tensor, scale: float, rows: int, bias: Tensor | None) -> Tensor:
    """Mean attention that every token gets from the first ``rows`` tokens.

    Args:
        q: queries, B×H×T×d.
        k: keys, B×H×T×d.
        scale: factor on their products.
        rows: as for :func:`class_attention`.
        bias: as there; the kernel takes one for every key, B×1×1×T.

    Returns:
        Mean over heads and asking tokens, B×T, float32.
    """
    return class_attention(q, k, scale, rows, bias).mean(dim=(1, 2))


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
